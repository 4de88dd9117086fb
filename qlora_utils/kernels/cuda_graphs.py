"""Capture forward and backward of a training pass once, and replay them without Python (notebook 04).

A pass of Llama-2-7b launches thousands of kernels. On a fast GPU many are done before the host has launched the next,
and the GPU waits half of the time. A CUDA graph holds all launches of a pass, recomputation included, and starts them
in one call. It is bound to the shapes and addresses of its tensors: passes are padded to a few lengths
(`packing.pad_pass`), each of which has its graph and its buffers.

CUDA graphs in PyTorch: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qlora_utils.tokens.packing import pad_pass, padded_length

# Computes loss and gradients of a pass; gradients are added to tensors that stay where they are.
ComputePass = Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


def capture(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Capture what a function launches as a CUDA graph; the function computes nothing meanwhile.

    Args:
        function: to capture. What it launches for the first time, such as kernels to compile, can fail.
        pool: from `torch.cuda.graph_pool_handle`: graphs that are replayed one after another can share one.

    Raises:
        Exception: whatever was launched cannot be captured, or memory ran out. Random numbers can be drawn as before.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads may allocate pinned memory meanwhile, which a capture of the whole process would forbid.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
    except BaseException:
        # A capture that fails can leave its own stream as the current one, and leaves the generator of random numbers
        # as one that is being captured.
        torch.cuda.set_stream(stream)
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph


class PassGraphs:
    """Replay captured passes, one graph for each padded length.

    All graphs share one pool of memory, which is as large as the largest of them needs: nothing in it outlives a pass.

    Args:
        compute: from the tensors of a pass and the number of answer tokens in the step; it returns the loss and adds
            the gradients.
        device: of the model.
        conversations: that a pass may hold at most.
    """

    def __init__(self, compute: ComputePass, device: torch.device, conversations: int) -> None:
        self.compute, self.conversations = compute, conversations
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.buffers: dict[int, dict[str, torch.Tensor]] = {}
        self.pool: Any = None
        self.loss = torch.zeros((), device=device)
        self.answers = torch.ones((), device=device)

    def begin_step(self, answers: Any) -> None:
        """Set the sum of losses to zero, and the number of answer tokens by which all losses are divided."""
        self.loss.zero_()
        self.answers.fill_(answers)

    def run(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Compute a pass; its loss is added to `self.loss`.

        Args:
            batch: tensors of a packed pass from `packing.Collator`.
        """
        length = padded_length(batch["input_ids"].shape[1])
        batch = pad_pass(batch, length, self.conversations)
        if length not in self.graphs:
            device = self.loss.device
            self.buffers[length] = {name: value.to(device) for name, value in batch.items()}
            self.graphs[length] = self._capture(self.buffers[length])
        else:
            for name, buffer in self.buffers[length].items():
                buffer.copy_(batch[name], non_blocking=True)
        self.graphs[length].replay()

    def warm_up(self) -> None:
        """Compute a pass of pad tokens without a label, so that kernels are loaded; all its gradients are zero."""
        device = self.loss.device
        nothing = torch.zeros((1, 0), dtype=torch.long, device=device)
        starts = torch.zeros(1, dtype=torch.int32, device=device)
        batch = {"input_ids": nothing, "labels": nothing, "position_ids": nothing, "starts": starts}
        batch["answer_positions"] = nothing[0]
        self.compute(pad_pass(batch, padded_length(1), self.conversations), self.answers)

    def _capture(self, inputs: Mapping[str, torch.Tensor]) -> torch.cuda.CUDAGraph:
        """Capture a pass that reads these inputs."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()

        def add_loss() -> None:
            self.loss += self.compute(dict(inputs), self.answers).detach()

        return capture(add_loss, self.pool)

    def free(self) -> None:
        """Give the graphs and their memory back."""
        self.graphs.clear()
        self.buffers.clear()
        self.pool = None
