"""Set-ups in which a probe could not be right are refused at construction: argument, value, remedy."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from common import arguments, rows, tiny_bert
from transformers import Trainer, TrainingArguments

import hf_lqa
from hf_lqa.options import parse_options


class Pretends(Trainer):
    """A Trainer whose surroundings are set after its construction, as the named back ends would."""

    def __init__(self, *args, pretend, **kwargs):
        super().__init__(*args, **kwargs)
        pretend(self)


class LQAPretends(hf_lqa.LQATrainerMixin, Pretends):
    pass


def deepspeed(trainer):
    trainer.is_deepspeed_enabled, trainer.args.deepspeed = True, "ds_config.json"


def split(size):
    def pretend(trainer):
        sizes = {"cp_size": 1, "sp_size": 1, size: 4}
        trainer.args.parallelism_config = SimpleNamespace(**sizes)

    return pretend


def tensor_parallel(trainer):
    # A model that was loaded with tp_plan="auto"; Accelerate itself allows no such Trainer on CPUs.
    trainer.model.__class__ = type("Sharded", (type(trainer.model),), {"tp_size": property(lambda self: 2)})


def data_parallel(trainer):
    trainer.args._n_gpu = 2
    # On a CPU the property measures the number of devices again.
    trainer.args.__class__ = type("Arguments", (TrainingArguments,), {"n_gpu": property(lambda self: 2)})


def xla(trainer):
    trainer.is_fsdp_xla_enabled = True


def xla_devices(trainer):
    real = trainer.accelerator
    trainer.accelerator = SimpleNamespace(distributed_type=DistributedType.XLA, state=real.state, device=real.device)


def fsdp1(trainer):
    trainer.is_fsdp_enabled = True
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    trainer.accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)


@pytest.mark.parametrize(
    ("pretend", "message"),
    [
        (deepspeed, r"deepspeed='ds_config.json' with optim='lqa': .*inside backward.* Use FSDP2 .*or another --optim"),
        (
            split("cp_size"),
            r"parallelism_config.cp_size=4 with optim='lqa': .* Use data parallelism or another --optim",
        ),
        (
            split("sp_size"),
            r"parallelism_config.sp_size=4 with optim='lqa': .* Use data parallelism or another --optim",
        ),
        (
            split("tp_size"),
            r"tp_size=4 with optim='lqa': .* without tp_plan and use FSDP2 .*or another --optim",
        ),
        (tensor_parallel, r"tp_size=2 with optim='lqa': "),
        (data_parallel, r"n_gpu=2 with optim='lqa': nn.DataParallel .* Use `torchrun --nproc_per_node N`"),
        (xla, r"distributed_type=.* with optim='lqa': XLA .* Use another --optim"),
        (xla_devices, r"distributed_type='XLA' with optim='lqa': XLA .* Use another --optim"),
        (fsdp1, r"fsdp_config\['version'\]=1 with optim='lqa': .* Set fsdp_config\['version'\] to 2"),
    ],
    ids=["DeepSpeed", "cp", "sp", "tp", "tp_plan", "DataParallel", "FSDP-XLA", "XLA", "FSDP1"],
)
def test_a_set_up_is_refused(pretend, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LQAPretends(tiny_bert(), arguments(tmp_path), train_dataset=rows(), pretend=pretend)
    # Another optimizer is nobody's business here.
    LQAPretends(tiny_bert(), arguments(tmp_path, optim="sgd"), train_dataset=rows(), pretend=pretend)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mp", r"smdistributed.modelparallel .* with optim='lqa': .* set \{'torch_distributed': .*FSDP2"),
        ("dp", r"sagemaker_distributed_dataparallel_enabled=True with optim='lqa': .* Set `distribution`"),
    ],
)
def test_sagemakers_own_back_ends_are_refused(kind, message, tmp_path, monkeypatch):
    # What decides is the environment and an installed smdistributed, which only SageMaker has.
    monkeypatch.setattr(hf_lqa.refusals, f"is_sagemaker_{kind}_enabled", lambda: True)
    with pytest.raises(ValueError, match=message):
        hf_lqa.LQATrainer(tiny_bert(), arguments(tmp_path), train_dataset=rows())
    hf_lqa.LQATrainer(tiny_bert(), arguments(tmp_path, optim="sgd"), train_dataset=rows())


@pytest.mark.parametrize(
    "base",
    ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise", "schedule_free_adamw", "schedule_free_sgd"],
)
def test_a_base_that_cannot_be_probed_is_refused(base, tmp_path):
    args = arguments(tmp_path, optim_args=f"base={base}")
    with pytest.raises(ValueError, match=rf"optim_args: base='{base}': .* Use e.g. base=adamw_torch"):
        hf_lqa.LQATrainer(tiny_bert(), args, train_dataset=rows())


@pytest.mark.parametrize("base", ["adamw_torch_xla", "lqa", "lqa_paper", "adam_of_my_own"])
def test_other_bases_that_are_refused(base):
    with pytest.raises(ValueError, match=rf"optim_args: base='{base}': .* Use e.g. base=adamw_torch"):
        parse_options(SimpleNamespace(optim="lqa", optim_args=f"base={base}"))
