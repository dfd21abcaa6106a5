"""A task of SLURM: joins the others and adds up with them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

jax.distributed.initialize()  # all by the variables of SLURM
mesh = Mesh(np.asarray(jax.devices()), ("data",))
rows = jax.make_array_from_process_local_data(
    NamedSharding(mesh, P("data")), np.full(1, jax.process_index() + 1, np.float32)
)
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(rows)
print(f"process {jax.process_index()} of {jax.process_count()}, sum {float(total)}", flush=True)
jax.distributed.shutdown()
