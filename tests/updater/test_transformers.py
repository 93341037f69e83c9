# SPDX-License-Identifier: MIT
"""The folder of a Hugging Face model, taken by transformers itself."""

import pytest
import torch

from tests.pipeline.recordings import same
from tests.updater.states import state
from updater import export as exports
from updater.export import export

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")


def test_transformers_loads_it(tmp_path, monkeypatch):
    """The library itself takes one file and several; it ties the head again, and reads the trainer's state."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install transformers)"
    )
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    of = state()
    of.model = model.state_dict()
    assert of.model["lm_head.weight"].data_ptr() == of.model["transformer.wte.weight"].data_ptr()
    for shard_bytes in (10**9, 4096):
        monkeypatch.setattr(exports, "SHARD_BYTES", shard_bytes)
        export(of, "huggingface", folder := tmp_path / str(shard_bytes))
        config.save_pretrained(folder)
        found, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert same({"model": found.state_dict(), "optimizer": {}}, {"model": of.model, "optimizer": {}}) == []
        assert transformers.TrainerState.load_from_json(folder / "trainer_state.json").global_step == 12


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_goes_on_from_it(tmp_path):
    """Given what FlowCheck does not know, configuration and schedule, it ends with the bits of a run that never stopped."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install transformers)"
    )
    pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")
    torch.manual_seed(0)
    data = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(0, 64, (64, 16))]
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 16}
    dropouts = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}

    def trained(folder, resume=None):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts))
        options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "lr_scheduler_type": "linear"}
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path / folder), **options, **quiet)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        assert trainer.state.global_step == 6
        return {"model": model.state_dict(), "optimizer": trainer.optimizer.state_dict()}

    never_stopped, at = trained("whole"), tmp_path / "whole" / "checkpoint-3"
    of = state(3)
    of.model = transformers.GPT2LMHeadModel.from_pretrained(at).state_dict()
    of.optimizer = torch.load(at / "optimizer.pt", weights_only=True)
    export(of, "huggingface", ours := tmp_path / "checkpoint-3")
    for name in ("config.json", "scheduler.pt"):
        (ours / name).write_bytes((at / name).read_bytes())
    assert same(trained("resumed", ours), never_stopped) == []
