"""Two checkpoints, an adapter, a running model or many training steps → spectra, tables and figures."""
