"""A model object that is handed in works as before when the engine or the training is over."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from reft_runtime import Engine, SamplingParams
from reft_runtime.base.linears import prepack
from reft_runtime.errors import ConfigError, UnsupportedModel
from reft_runtime.loading.loader import adopt_model
from reft_runtime.training import TrainSettings, direction, evaluate, train
from reft_runtime.training.scoring import Metric
from tests.helpers.models import generate, prompt, tiny
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import ROWS

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def answer(model: PreTrainedModel) -> list[int]:
    torch.manual_seed(0)  # of dropout
    return generate(model, prompt(7))


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of the model's loss on a prompt, by parameter."""
    ids = torch.tensor([prompt(9)])
    model.zero_grad()
    torch.manual_seed(0)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def state(model: PreTrainedModel) -> dict[str, Any]:
    """What the engine changes in a model, apart from its weights' values."""
    return {
        "attention": model.config._attn_implementation,
        "training": [module.training for module in model.modules()],
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forwards": [module.forward for module in model.modules()],
        "shared": [id(p) == id(model.get_input_embeddings().weight) for p in model.parameters()],
    }


def as_handed_in(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model as a user may have it: some of it frozen, some of it in training mode."""
    model = tiny(model_type, tie_word_embeddings=model_type == "qwen2")
    model.to(dtype)  # type: ignore[arg-type]
    model.get_input_embeddings().requires_grad_(False)
    next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0].train()
    return model


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("qwen2", torch.float32),
        ("qwen3", torch.bfloat16),
        ("gpt2", torch.float32),
        ("deepseek_v3", torch.float32),
        ("llama4_text", torch.float32),
    ],
)
def test_a_closed_engine_gives_its_model_back(model_type: str, dtype: torch.dtype) -> None:
    model = as_handed_in(model_type, dtype)
    before, weights = state(model), copy.deepcopy(model.state_dict())
    wanted, slopes = answer(model), gradients(model)
    for _ in range(2):
        engine = Engine(model, tokenizer=tiny_tokenizer(), max_running=2)
        engine.generate([list(prompt(7))], GREEDY, progress=False)
        assert state(model) != before
        engine.close()
        engine.close()
        assert state(model) == before
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert answer(model) == wanted
        found = gradients(model)
        assert found.keys() == slopes.keys()
        assert all(torch.equal(found[name], slope) for name, slope in slopes.items())


def test_parameters_that_somebody_holds_are_put_back_themselves() -> None:
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = list(model.parameters())
    with Engine(model, tokenizer=tiny_tokenizer(), max_running=2):
        pass
    assert all(own is theirs for own, theirs in zip(model.parameters(), held, strict=True))
    head: nn.Module = model.get_submodule("lm_head")
    before = head.weight.clone()  # type: ignore[operator]
    gradients(model)
    optimizer.step()
    assert not torch.equal(head.weight, before)  # type: ignore[arg-type]


def test_packed_weights_take_no_memory_twice() -> None:
    model = tiny("llama")
    weights = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    with Engine(model, tokenizer=tiny_tokenizer(), max_running=2):
        gc.collect()
        assert not [weight for weight in weights if weight() is not None]


class Table(nn.Module):
    """A module that has a linear layer's weight by another name."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_a_module_has_by_another_name_is_put_back(dtype: torch.dtype) -> None:
    model: Any = as_handed_in("llama", dtype)
    model.model.table = Table(model.lm_head.weight)
    wanted = model.lm_head.weight.detach().clone()
    with Engine(model, tokenizer=tiny_tokenizer(), max_running=2):
        pass
    assert torch.equal(model.lm_head.weight, wanted)
    assert model.model.table.table is model.lm_head.weight


def test_a_model_has_one_engine_at_a_time() -> None:
    model = tiny("llama")
    tokenizer = tiny_tokenizer()
    with Engine(model, tokenizer=tokenizer, max_running=2) as engine:
        for other in (
            lambda: Engine(model, tokenizer=tokenizer),
            lambda: evaluate([ROWS], model=model, tokenizer=tokenizer, progress=False),
            lambda: train(ROWS, "no.safetensors", model=model, tokenizer=tokenizer),
            lambda: direction(["a b"], ["c d"], layer=0, model=model, tokenizer=tokenizer),
        ):
            with pytest.raises(ConfigError, match=r"model: .*close\(\)") as refused:
                other()
            assert refused.value.param == "model"
        with pytest.raises(UnsupportedModel, match=r"close\(\)"):
            generate(model, prompt(3))
        assert engine.generate([list(prompt(7))], GREEDY, progress=False)
    with Engine(model, tokenizer=tokenizer, max_running=2):
        pass


def test_a_second_close_leaves_the_model_to_its_next_engine() -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    with Engine(model, tokenizer=tokenizer, max_running=2) as first:
        first.close()
        with Engine(model, tokenizer=tokenizer, max_running=2) as second:
            serving = state(model)
            first.close()
            assert state(model) == serving
            with pytest.raises(ConfigError, match=r"model: .*close\(\)"):
                Engine(model, tokenizer=tokenizer)
            assert second.generate([list(prompt(7))], GREEDY, progress=False)


def test_of_two_threads_one_gets_the_model() -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    start, made, refused = threading.Barrier(2), list[Engine](), list[ConfigError]()

    def make() -> None:
        start.wait()
        try:
            made.append(Engine(model, tokenizer=tokenizer, max_running=2))
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 1)
    made[0].close()


def no_cache(model: PreTrainedModel) -> None:
    Engine(model, tokenizer=tiny_tokenizer(), kv_tokens=1)


def not_supported(model: PreTrainedModel) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reft_runtime.loading.loader.prepack", _refusing)
        Engine(model, tokenizer=tiny_tokenizer())


def too_long(model: PreTrainedModel) -> None:
    Engine(model, tokenizer=tiny_tokenizer(), max_model_len=10**6)


def no_file(model: PreTrainedModel) -> None:
    direction(["a"], ["b"], layer=0, model=model, tokenizer=tiny_tokenizer())


def _refusing(*given: Any) -> Any:
    prepack(*given)
    raise UnsupportedModel("for a test")


@pytest.mark.parametrize("fails", [no_cache, not_supported, too_long, no_file])
def test_what_fails_gives_the_model_back(fails: Callable[[PreTrainedModel], None]) -> None:
    model = as_handed_in("llama")
    before, wanted = state(model), answer(model)
    with pytest.raises((ConfigError, UnsupportedModel)):
        fails(model)
    assert state(model) == before
    assert answer(model) == wanted
    with Engine(model, tokenizer=tiny_tokenizer(), max_running=2):
        pass


def test_training_and_measuring_give_the_model_back(tmp_path: Path) -> None:
    model, tokenizer = as_handed_in("llama"), tiny_tokenizer()
    before, wanted = state(model), answer(model)
    settings = TrainSettings(steps=2, batch_size=4, rank=1)
    trained = train(
        ROWS,
        tmp_path / "a.safetensors",
        model=model,
        tokenizer=tokenizer,
        settings=settings,
        progress=False,
    )
    assert trained.model is model
    assert state(model) == before
    metrics: tuple[Metric, ...] = ("accuracy", "perplexity")
    for metric in metrics:
        evaluate([ROWS[:2]], model=model, tokenizer=tokenizer, metric=metric, progress=False)
        assert state(model) == before
    direction(["a b"], ["c d"], layer=0, model=model, tokenizer=tokenizer, progress=False)
    assert state(model) == before
    assert answer(model) == wanted


def test_a_closed_engine_holds_no_cache() -> None:
    engine = Engine(tiny("llama"), tokenizer=tiny_tokenizer(), max_running=2)
    storage = weakref.ref(engine._loop._core.runner.storage)
    engine.close()
    gc.collect()
    assert storage() is None
    assert engine.stats().running == 0


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "deepseek_v3"])
def test_a_closed_engine_holds_no_weights_of_its_own_model(model_type: str, tmp_path: Path) -> None:
    """Whoever still has the engine, and without a collection of garbage."""
    tiny(model_type).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = Engine(tmp_path, max_running=2, dtype="float32")
    engine.generate([list(prompt(7))], GREEDY, progress=False)
    gc.disable()
    try:
        weights = [
            StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
            for weight in engine._loop._core.loaded.model.parameters()
            if not weight.is_mkldnn
        ]
        assert len(weights) >= 10
        engine.close()
        engine.close()
        assert [weight for weight in weights if not weight.expired()] == []  # type: ignore[no-untyped-call]
    finally:
        gc.enable()
    assert engine.stats().running == 0


@pytest.mark.parametrize("path", ["", "input_layernorm", "mlp", "mlp.down_proj", "mlp.gate_proj"])
def test_gradients_flow_through_what_is_fused(path: str) -> None:
    plain = tiny("llama")
    fused = adopt_model(copy.deepcopy(plain)).model
    slopes = []
    for model in (plain, fused):
        model.set_attn_implementation("eager")
        module = model.get_submodule(f"model.layers.1.{path}".rstrip("."))
        width = getattr(module, "in_features", 32)
        rows = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0))
        rows.requires_grad_()
        turned = model.model.rotary_emb(rows, torch.arange(5)[None])
        made = module(rows) if path else module(rows, position_embeddings=turned)
        made.square().sum().backward()
        assert rows.grad is not None
        slopes.append(rows.grad)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
