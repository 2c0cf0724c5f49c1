"""Generated protocol stubs; regenerate with `make proto`."""
