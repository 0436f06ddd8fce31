"""Runs on a Ray cluster: submitted through its Jobs API, trained by Ray Train, each rank a process of its own."""
