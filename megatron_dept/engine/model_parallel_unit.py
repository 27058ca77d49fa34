"""Megatron's `mpu`, as DeepSpeed asks for it: which of a silo's ranks are tensor ranks and which are data ranks."""

import torch.distributed as dist

from megatron_dept.topology.layout import SiloShape


class ModelParallelUnit:
    """Groups of a silo without pipeline, registered with torch.distributed; method names are Megatron-LM's."""

    def __init__(self, data: dist.ProcessGroup, tensor: dist.ProcessGroup) -> None:
        self._data = data
        self._tensor = tensor

    @classmethod
    def create(cls, shape: SiloShape) -> "ModelParallelUnit":
        """Collective over the silo, whose ranks are torch's default group."""
        assert shape.pipe == 1
        data_ranks = [[shape.rank(0, d, t) for d in range(shape.data)] for t in range(shape.tensor)]
        tensor_ranks = [[shape.rank(0, d, t) for t in range(shape.tensor)] for d in range(shape.data)]
        data, _ = dist.new_subgroups_by_enumeration(data_ranks)
        tensor, _ = dist.new_subgroups_by_enumeration(tensor_ranks)
        return cls(data, tensor)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1
