"""Imported by the fork server alone: a signal to the whole process group must not end it before its ranks saved."""

from __future__ import annotations

import signal

for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_IGN)
