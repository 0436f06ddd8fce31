"""The same faults on Lightning, webdataset and torchrun, as their manuals show them, with no code of ours."""
