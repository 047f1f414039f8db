"""What the server of child processes imports once, so that no child has to; nothing is computed.

torch imports these at the first backward and the first nested tensor, which takes a second.
"""

import contextlib
from importlib import import_module

for _name in (
    "torch.fx.experimental.symbolic_shapes",
    "torch.nested._internal.sdpa",
    "torch.nested._internal.ops",
    "torch.utils.checkpoint",
    "torch._dynamo",
    "torch.distributed._functional_collectives",
):
    with contextlib.suppress(ImportError):  # private names of torch may go
        import_module(_name)
