"""What `test_distributed` starts on several processes: the training runs that a JSON file describes, one by one."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from common import Recorder, arguments, language_rows, rows, tiny_bert, tiny_llama
from transformers import TrainerCallback

from hf_lqa import LQATrainer, slopes

FSDP_CONFIG = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
}


def allow_fsdp_on_cpu() -> None:
    """Accelerate turns FSDP on for accelerators only; everything after that decision works with gloo processes too."""
    original = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
        if self.distributed_type == DistributedType.MULTI_CPU and plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = __init__


class Dies(TrainerCallback):
    def __init__(self, rank: int):
        self.rank = rank

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and args.process_index == self.rank:
            os._exit(3)


class WithAutograd(TrainerCallback):
    """Has all replays run as those of losses that differentiate."""

    def __init__(self, trainer: LQATrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.lqa.counts.update(replays_checked=1, replays_with_grad=1)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> None:
    torch.set_num_threads(1)
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state(True)
        run(spec)


def run(spec: dict[str, Any]) -> None:
    out = Path(spec["out"])
    if spec.get("model") == "llama":
        model, data, layer = tiny_llama(), language_rows(128), "LlamaDecoderLayer"
    else:
        model, data, layer = tiny_bert(dropout=0.1), rows(128), "BertLayer"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(spec.get("train_only", "")))
    # As in large matrices, of which every eighth row is observed.
    slopes.LARGE, slopes.MANY_ROWS = (1, 8) if spec.get("sampled") else (2**14, 64)
    options = dict(spec["arguments"])
    if "state_dict_type" in spec:
        config = {"transformer_layer_cls_to_wrap": [layer], "state_dict_type": spec["state_dict_type"]}
        options |= {"fsdp": True, "fsdp_config": {**FSDP_CONFIG, **config}}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        options["ddp_backend"] = "gloo"
    trainer = LQATrainer(model, arguments(out / "trainer", **options), train_dataset=data)
    recorder = Recorder(trainer)
    if spec.get("autograd"):
        trainer.add_callback(WithAutograd(trainer))
    if "dies" in spec:
        trainer.add_callback(Dies(spec["dies"]))
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    rank = trainer.args.process_index
    state = {k.removeprefix("module."): full(v).cpu() for k, v in trainer.model_wrapped.state_dict().items()}
    if rank == 0:
        torch.save(state, out / "weights.pt")
    found = {
        "steps": recorder.steps,
        "type": trainer.accelerator.distributed_type.value,
        "precision": trainer.accelerator.mixed_precision,
        "sharded": any(hasattr(p, "full_tensor") for g in trainer.lqa.param_groups for p in g["params"]),
    }
    (out / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    main()
    if torch.distributed.is_initialized():
        gc.collect()  # the DDP model before the group that it holds, as `python -m hf_lqa` does
        torch.distributed.destroy_process_group()
