"""What of a GPU's architecture decides which kernels run and how they are launched."""

from __future__ import annotations

from dataclasses import dataclass

# Resident threads of one SM by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
_THREADS_PER_SM = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}
_SHARED_MEMORY_KIB = {
    (7, 0): 96, (7, 2): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (12, 0): 99, (12, 1): 99,
}  # fmt: skip
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The facts of a GPU type that the virtual GPU needs."""

    compute_capability: tuple[int, int] = (9, 0)
    num_sms: int = 132
    torch_version: tuple[int, int] = (2, 11)

    @property
    def threads_per_sm(self) -> int:
        return _THREADS_PER_SM.get(self.compute_capability, 2048)

    @property
    def shared_memory_per_block(self) -> int:
        """Bytes that a block may ask for: CUDA C++ Programming Guide, "Technical Specifications per Compute
        Capability"."""
        return _SHARED_MEMORY_KIB.get(self.compute_capability, 227) * 1024

    @property
    def cublas_workspace_bytes(self) -> int:
        """Kept for each cuBLAS handle: ``getChosenWorkspaceSize`` in aten/src/ATen/cuda/CublasHandlePool.cpp.

        32 MiB on Hopper (measured: twice that, for the forward and the backward thread, closed a constant gap in every
        case), else 4096 KiB x 2 + 16 KiB x 8 = 8.125 MiB.
        """
        return 32 * MIB if self.compute_capability[0] in (9, 10) else 8 * MIB + 128 * 1024

    @property
    def cublaslt_workspace_bytes(self) -> int:
        """Kept for each thread that multiplies with a fused bias (``addmm``): 1 MiB in the recorded traces of torch
        2.11."""
        return MIB

    @property
    def prefers_cudnn_attention(self) -> bool:
        """``check_prefer_cudnn_attention`` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: Hopper and
        data-centre Blackwell.

        Needs a cuDNN newer than 9.15, which the CUDA 13 wheels bring since torch 2.10; seen in traces of torch 2.11 on
        an H200.
        """
        return self.compute_capability[0] in (9, 10) and self.torch_version >= (2, 10)

    @property
    def cudnn_dropout_state_bytes(self) -> int:
        """Random state of cuDNN's dropout: 24 bytes for each resident thread.

        ``cudnnDropoutGetStatesSize`` answers 6,488,064 on an H200.
        """
        return 24 * self.num_sms * self.threads_per_sm
