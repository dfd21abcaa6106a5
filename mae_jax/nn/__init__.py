"""Parts that methods are built from; no paper's whole model in here."""
