"""A ClearML server for tests: it speaks the protocol of the real one and keeps all in memory.

```python
with ClearMLServer() as server:
    subprocess.run(command, env=os.environ | server.environment(tmp_path))
    assert server.state.task_named("my run")["status"] == "completed"
    assert not server.state.unknown
    server.fault = HANG.only(lambda endpoint: endpoint.startswith("events."))
    server.files_fault = REFUSE
    server.heal()
```

Let no process that was forked from the test's own outlive it: it would hold the ports open.
"""

from clearml_server.faults import DROP, ERROR500, HANG, REFUSE, UNAUTHORIZED, Fault, slow
from clearml_server.server import ClearMLServer
from clearml_server.state import EventKey, Request, State, TaskEvents

__all__ = [
    "DROP",
    "ERROR500",
    "HANG",
    "REFUSE",
    "UNAUTHORIZED",
    "ClearMLServer",
    "EventKey",
    "Fault",
    "Request",
    "State",
    "TaskEvents",
    "slow",
]
