"""A job's model behind an OpenAI-compatible server: what of the job that concerns, the server's
process, and how it ends.

The engine's kind says how it serves (`ServingKind`). Must not know: click, any engine.
"""

from batchinfer.serving.address import Address, bind, let_go
from batchinfer.serving.order import ServerOrder, Service, prepare
from batchinfer.serving.process import ServerProcess

__all__ = ["Address", "ServerOrder", "ServerProcess", "Service", "bind", "let_go", "prepare"]
