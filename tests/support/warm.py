"""Imported once by the fork server: everything a rank needs, and nothing that starts a thread."""

import gc
import warnings

warnings.filterwarnings("ignore")

# ZeRO asks it whether an optimizer is one it knows; its import compiles, that is, loads the whole of inductor.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import deepspeed.runtime.zero.stage3  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

import megatron_dept.training.setup  # noqa: E402, F401

gc.freeze()
