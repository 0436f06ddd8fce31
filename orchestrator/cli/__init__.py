"""The command line: one module per family of verbs; only this package prints."""
