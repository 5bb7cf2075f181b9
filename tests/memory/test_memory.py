"""The memory estimate: exact where it can be, never below what is really held, and never a guess that passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.memory import (
    KnownModel,
    MemoryPlan,
    ModelShape,
    Term,
    kill_floor,
    margin,
    pipeline_memory,
    pipeline_peak,
)
from latentforge.memory.activations import activation_bytes, attention_bytes
from latentforge.memory.codec import codec_activation_bytes, codec_parameters
from latentforge.memory.estimate import (
    student_shape,
    teacher_shape,
)
from latentforge.memory.latent import energy_bytes, latent_activation_bytes
from latentforge.memory.plan import GIB
from latentforge.memory.training import Step, adapter_parameters, training_terms
from latentforge.spec.latent import AutoencoderSpec, LatentSpec
from latentforge.spec.lora import LoraSpec
from latentforge.spec.recipe import read_recipe, recipe_names
from latentforge.spec.resolve import resolve_pipeline
from latentforge.verdicts import Outcome


def config(shape: ModelShape, **more: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        use_cache=False,
        **more,
    )


def counted(configuration: Any) -> int:
    """Parameters of the model that transformers makes of a configuration, without allocating them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_the_parameter_count_of_a_recipes_models_is_exact(recipe: str, who: str) -> None:
    given = [f"{field}=/somewhere" for field in read_recipe(recipe).needs]
    spec = resolve_pipeline(recipe, overrides=given).spec
    vocab_size = spec.data.vocab_size
    shape = (
        teacher_shape(spec.teacher, vocab_size) if who == "teacher" else student_shape(spec.distill.student, vocab_size)
    )
    assert shape.parameters == counted(config(shape))


@pytest.mark.parametrize("tied", [True, False])
def test_the_count_holds_where_heads_do_not_divide_the_hidden_size(tied: bool) -> None:
    shape = ModelShape(1000, 3, 96, 4, 2, 256, head_dim=40, tied=tied)
    assert shape.parameters == counted(config(shape))
    assert ModelShape.from_config(config(shape).to_dict()) == shape


@pytest.mark.parametrize("kind", ["Qwen2Config", "LlamaConfig", "MistralConfig"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_count_from_a_config_file_is_exact_for_each_type_that_is_counted(kind: str, tied: bool) -> None:
    import transformers

    configuration = getattr(transformers, kind)(
        vocab_size=999, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, head_dim=16,
    )  # fmt: skip
    assert ModelShape.from_config(configuration.to_dict()).parameters == counted(configuration)


def test_a_type_that_is_not_counted_is_refused_by_name() -> None:
    with pytest.raises(RefusedError, match="mamba"):
        ModelShape.from_config({"model_type": "mamba"})
    with pytest.raises(RefusedError, match="lacks vocab_size"):
        ModelShape.from_config({"model_type": "qwen3", "num_hidden_layers": 1})


GOOD: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 151_936, "num_hidden_layers": 28, "hidden_size": 1024, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers = '0' is no size"),
        ({"num_hidden_layers": -5}, "num_hidden_layers = '-5' is no size"),
        ({"num_hidden_layers": "28"}, "num_hidden_layers = '28' is no size"),
        ({"num_hidden_layers": True}, "num_hidden_layers = 'True' is no size"),
        ({"hidden_size": 1024.0}, "hidden_size = '1024.0' is no size"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads = '0' is no size"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads = '8' is no size"),
        ({"num_key_value_heads": 64}, "16 heads, 64 for keys"),
        ({"head_dim": 0}, "head_dim = '0' is no size"),
        ({"model_type": "llama", "head_dim": None, "hidden_size": 8, "num_key_value_heads": 16}, "do not go together"),
        ({"num_hidden_layers": 10**400}, "is no size"),
        ({"tie_word_embeddings": "false"}, "'false' is neither true nor false"),
        ({"num_experts": 128}, "experts"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_a_config_with_an_impossible_value_is_refused_with_it_and_never_counted(wrong: Any, said: str) -> None:
    assert ModelShape.from_config(GOOD).parameters == 596_049_920  # Qwen3-0.6B
    with pytest.raises(RefusedError, match=said):
        ModelShape.from_config({**GOOD, **wrong})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_states_are_those_that_the_optimiser_really_holds(precision: str) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    from latentforge.train.optimiser import MasterOptimiser, Updates

    shape = ModelShape.qwen3(320, layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128)
    model = Qwen3ForCausalLM(config(shape)).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    optimiser = MasterOptimiser(model, Updates(1e-3, 0.1, warmup_steps=0, steps=2, clip_norm=1.0))

    def backward() -> None:
        model(torch.randint(0, shape.vocab_size, (2, 8))).logits.float().sum().backward()

    backward()
    optimiser.collect()
    optimiser.step()
    backward()
    optimiser.collect()
    backward()  # the second micro-batch: all gradients are there
    held = {}
    for tensor in (*model.parameters(), *optimiser.masters.values(), *optimiser.moments().values()):
        for one in (tensor, tensor.grad) if isinstance(tensor, torch.nn.Parameter) or tensor.is_leaf else (tensor,):
            if one is not None and one.numel() > 1:
                held[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    terms = {term.name: term.bytes for term in training_terms(
        shape, Step(1, 1, precision), who="student", device="cpu"
    )}  # fmt: skip
    assert sum(held.values()) == terms["student"] + terms["states"]


def test_adapters_are_counted_to_the_number_and_have_the_only_gradients_and_moments() -> None:
    from transformers import Qwen3ForCausalLM

    from latentforge.students.adapters import Lora, adapt, adapters

    shape = ModelShape.qwen3(320, layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128)
    asked = LoraSpec(rank=3)
    model = Qwen3ForCausalLM(config(shape))
    adapt(model, Lora(3, asked.alpha, 0.0, asked.target_modules), seed=1)
    count = adapter_parameters(shape, asked)
    assert count == sum(p.numel() for _, p in adapters(model))
    terms = {t.name: t.bytes for t in training_terms(shape, Step(1, 1, adapters=count), who="student", device="cpu")}
    assert terms["student"] == 4 * (shape.parameters + count)
    assert (terms["states"], terms["checkpoint"]) == (12 * count, 12 * count)
    assert adapter_parameters(shape, LoraSpec(rank=3, target_modules=("c_attn",))) is None


def kept_for_backward(model: Any, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of what ``forward`` computes with ``model``, its weights not counted."""
    import torch

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [
        ModelShape.qwen3(320, layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128),
        ModelShape.qwen3(512, layers=3, hidden=128, heads=4, kv_heads=2, intermediate=384),
        ModelShape.qwen3(320, layers=1, hidden=96, heads=2, kv_heads=1, intermediate=512),
        ModelShape.qwen3(320, layers=2, hidden=64, heads=4, kv_heads=4, intermediate=64),
    ],
)
def test_activations_are_not_underestimated_nor_doubled(shape: ModelShape, precision: str) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config(shape)).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    rows, length = 4, 32
    held = kept_for_backward(model, lambda: model.model(torch.randint(0, shape.vocab_size, (rows, length))))
    assert held <= activation_bytes(shape, rows * length, precision) <= 1.3 * held


@pytest.mark.parametrize("chunk", [1, 4, 8])
@pytest.mark.parametrize("changed", [{}, {"width": 48, "inner": 200, "latent": 96}])
def test_a_codecs_parameters_are_exact_and_its_activations_neither_underestimated_nor_doubled(
    chunk: int, changed: dict[str, int]
) -> None:
    import torch

    from latentforge.students.latent.codec import CodecShape, new_codec
    from latentforge.students.latent.codec_loss import CodecObjective, codec_loss, noise_of

    spec = AutoencoderSpec.model_validate(changed)
    codec = new_codec(CodecShape(320, chunk, spec.latent, spec.width, spec.inner), seed=1)
    assert codec_parameters(spec, chunk=chunk, vocab_size=320) == sum(p.numel() for p in codec.parameters())
    chunks, objective = torch.randint(0, 320, (256, chunk)), CodecObjective(0.1, 0.1, 0.001, 0.5)
    kept = kept_for_backward(codec, lambda: codec_loss(codec, chunks, chunks >= 0, objective, noise_of(1, 1)))
    # The gradient of the last layer's weight is made in the forward pass, and counted among the states.
    held = kept - 320 * spec.width * 4
    assert held <= codec_activation_bytes(spec, chunk=chunk, chunks=256) <= 1.3 * held


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("chunk", "blocks", "draws", "token_layers"), [(4, 2, 8, 1), (2, 1, 4, 0)])
def test_a_latent_students_activations_are_neither_underestimated_nor_a_fifth_too_many(
    chunk: int, blocks: int, draws: int, token_layers: int, again: bool
) -> None:
    import torch

    from latentforge.kernels.targets import DenseTargets
    from latentforge.students.latent.backbone import DecoderShape
    from latentforge.students.latent.energy import EnergySettings
    from latentforge.students.latent.student import EnergySignal, LatentShape, LatentStudent, TokenSignal, predicted

    sizes = {"layers": 3, "hidden": 96, "heads": 4, "kv_heads": 2, "intermediate": 256, "head_blocks": blocks}
    untold = {} if token_layers else {"token_ce_weight": 0, "token_kd_weight": 0}
    student = {**sizes, "token_layers": token_layers, "noise": 32}
    checked = {"student": student, "draws": draws, "samples": 32, "activation_checkpointing": again, **untold}
    spec, latent = LatentSpec.model_validate(checked), 64
    shape = DecoderShape(3, 96, 4, 2, 256)
    shaped = LatentShape(64, chunk, latent, shape, head_blocks=blocks, noise=32, token_layers=token_layers)
    model = LatentStudent.new(shaped, seed=1, energy=EnergySettings(draws=draws, samples=32)).train()
    if again:
        model.checkpoint_activations()
    chunks = torch.randint(0, 64, (2, 48, chunk))
    given, rows = predicted(torch.ones_like(chunks, dtype=torch.bool)), 2 * (48 * chunk - 1)
    mean = torch.randn(2, 47, 1, latent)
    signal = EnergySignal(mean, torch.full_like(mean, -2.0), given, 1.0, 1.0)
    tokens = TokenSignal(DenseTargets(torch.randn(rows, 64)), float(rows), 0.3, 0.7) if token_layers else None
    told = {"energy": {"text": signal, "sample": signal}, "tokens": tokens}
    kept = kept_for_backward(model, lambda: model(chunks, torch.ones_like(chunks) > 0, torch.arange(2), **told))
    planned = latent_activation_bytes(spec, chunk=chunk, chunks=94, signals=2) + 2 * energy_bytes(spec, latent, 94)
    assert kept <= planned <= 1.2 * kept


def test_a_checkpoint_after_the_last_step_finds_the_room_of_the_pass_that_is_over() -> None:
    for recipe, stage in (
        ("smoke", "teacher"),
        ("smoke", "distill"),
        ("smoke-latent", "autoencoder"),
        ("smoke-latent", "latent"),
    ):
        spec = resolve_pipeline(recipe).spec
        steps = getattr(spec, stage).steps
        late = resolve_pipeline(recipe, overrides=[f"{stage}.checkpoint_every={steps}"]).spec
        early = resolve_pipeline(recipe, overrides=[f"{stage}.checkpoint_every={steps - 1}"]).spec
        last, beside = (pipeline_memory(one)[stage] for one in (late, early))
        held = {term.name: term.bytes for term in beside.terms}
        room = sum(held.get(name, 0) for name in ("activations", "logits", "energy", "attention"))
        assert beside.bytes - last.bytes == min(held["checkpoint"], room) > 0


def test_attention_is_sized_by_the_rows_that_run_not_by_the_longest_position() -> None:
    # aprender's D13: 14 heads at 32768 positions asked 60 GB a block where the rows had 2048.
    shape = ModelShape(151_936, 24, 896, 14, 2, 4864, 64)
    assert attention_bytes(shape, 1, 32_768) // 2 == 60_129_542_144
    assert attention_bytes(shape, 1, 2_048) < GIB


def test_margins_are_those_of_the_design() -> None:
    assert (margin(128 * GIB), kill_floor(128 * GIB)) == (128 * GIB * 12 // 100, 128 * GIB * 6 // 100)
    assert (margin(256 * GIB), kill_floor(256 * GIB)) == (16 * GIB, 8 * GIB)


PLAN = MemoryPlan("distill", (Term("teacher", 2 * GIB), Term("student", GIB)))


def test_enough_says_every_term_and_no_reading() -> None:
    verdict = PLAN.verdict(100 * GIB, 50 * GIB)
    assert verdict.outcome is Outcome.PASS
    assert verdict.text == "enough: teacher 2.0 + student 1.0 + margin 12.0 = 15.0 GiB"
    assert PLAN.verdict(100 * GIB, 51 * GIB) == verdict


@pytest.mark.parametrize(
    ("total", "available", "said"),
    [
        (100 * GIB, 14 * GIB, "not enough now"),
        (3 * GIB, 3 * GIB, "not enough: "),
        (None, 1, "unknown"),
        (1, None, "unknown"),
    ],
)
def test_what_does_not_fit_or_is_not_known_does_not_pass(total: int | None, available: int | None, said: str) -> None:
    verdict = PLAN.verdict(total, available)
    assert verdict.outcome is not Outcome.PASS
    assert verdict.text.startswith(said)


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40))
def test_more_free_memory_never_makes_it_worse(need: int, total: int, available: int) -> None:
    plan = MemoryPlan("x", (Term("a", need),))
    assert plan.verdict(total, available).outcome <= plan.verdict(total, available + GIB).outcome
    if plan.verdict(total, available).outcome is Outcome.PASS:
        assert need + margin(total) <= min(total, available)


def test_a_folder_of_unknown_size_is_unknown_not_enough() -> None:
    spec = resolve_pipeline("tiny", overrides=["teacher.model=/somewhere"]).spec
    assert pipeline_peak(spec).verdict(128 * GIB, 100 * GIB).outcome is Outcome.UNKNOWN
    shape = ModelShape(151_936, 28, 1024, 16, 8, 3072, 128)
    peak = pipeline_peak(spec, teacher=KnownModel.of_shape(shape))
    assert peak.verdict(128 * GIB, 100 * GIB).outcome is Outcome.PASS
    assert any(term.bytes == shape.parameters * 4 for term in peak.terms if term.name == "teacher")


def test_a_folder_is_counted_in_fp32_as_runs_load_it_whatever_it_keeps_on_disk() -> None:
    spec = resolve_pipeline("tiny", overrides=["teacher.model=/somewhere"]).spec
    shape = ModelShape.from_config(GOOD)
    plans = pipeline_memory(spec, teacher=KnownModel(shape, 2 * shape.parameters))
    assert plans["score"].terms[0] == Term("teacher", 4 * shape.parameters)


def test_a_model_that_cannot_be_counted_is_refused_where_its_files_alone_do_not_fit() -> None:
    spec = resolve_pipeline("tiny", overrides=["teacher.model=/somewhere"]).spec
    unknown = pipeline_peak(spec, teacher=KnownModel(bytes=30 * GIB)).verdict(122 * GIB, 110 * GIB)
    assert unknown.outcome is Outcome.UNKNOWN
    verdict = pipeline_peak(spec, teacher=KnownModel(bytes=160 * GIB)).verdict(122 * GIB, 110 * GIB)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.text.startswith("not enough, even without the teacher: teacher 160.0 + ")


def test_a_full_run_from_a_store_does_not_hold_its_teacher_beside_the_student() -> None:
    smoke, full = (
        pipeline_memory(resolve_pipeline("smoke").spec.model_copy(update={"profile": profile}))
        for profile in ("smoke", "full")
    )
    assert "teacher" in {term.name for term in smoke["distill"].terms}
    assert "teacher" not in {term.name for term in full["distill"].terms}
    assert "teacher" in {term.name for term in full["score"].terms}


def test_the_smoke_pipelines_plan_names_its_terms_and_fits_a_small_machine() -> None:
    spec = resolve_pipeline("smoke").spec
    plans = pipeline_memory(spec)
    assert list(plans) == ["teacher", "score", "distill"]
    names = [term.name for term in plans["distill"].terms]
    assert names == [
        "teacher",
        "student",
        "start",
        "twin",
        "states",
        "checkpoint",
        "activations",
        "logits",
        "targets",
        "attention",
        "runtime",
    ]
    # Of two batches ahead, the step's own and one that is put together: 32 entries and a tail a position.
    targets = next(term.bytes for term in plans["distill"].terms if term.name == "targets")
    assert targets == 4 * spec.distill.batch_size * (spec.data.sequence_length - 1) * (32 * 8 + 4)
    assert pipeline_peak(spec).verdict(4 * GIB, 3 * GIB).outcome is Outcome.PASS


def test_live_targets_need_no_score_run_and_more_logits() -> None:
    stored, live = (
        pipeline_memory(resolve_pipeline("smoke", overrides=[f"distill.targets={kind}"]).spec)
        for kind in ("store", "live")
    )
    assert "score" not in live
    assert live["distill"].bytes > stored["distill"].bytes
