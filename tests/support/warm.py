"""Imported once by the fork server: everything a rank needs, and nothing that starts a thread."""

import gc
import warnings

warnings.filterwarnings("ignore")

import deepspeed.ops  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401  ZeRO imports it late, and all of inductor with it
import deepspeed.runtime.zero.stage3  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

import megatron_dept.training.setup  # noqa: E402, F401

# Looked up once it is known; the first look tries the compiler, which takes half as long as a small run.
assert deepspeed.ops.__compatible_ops__

gc.freeze()
