"""The registry and the walk: which weights are found, under which names, and how each is grouped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nmsparse_ext import registry
from nmsparse_ext.pattern import Pattern
from nmsparse_ext.registry import register_module
from nmsparse_ext.weights import canonical_name, prunable_weights, weights


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry._RULES._entries)
    yield
    registry._RULES._entries = before


def group_dims(model: nn.Module) -> dict[str, int | None]:
    return {weight.name: weight.group_dim for weight in prunable_weights(model)}


class MixedTypes(nn.Module):
    """One of each, to be looked up by name only."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class TestModuleTypes:
    def test_linear_and_convolutions(self) -> None:
        model = MixedTypes(
            linear=nn.Linear(8, 4),
            conv1d=nn.Conv1d(8, 4, 3),
            conv2d=nn.Conv2d(8, 4, 3),
            conv3d=nn.Conv3d(8, 4, 3),
            norm=nn.BatchNorm2d(4),
        )
        assert group_dims(model) == dict.fromkeys(
            ["linear.weight", "conv1d.weight", "conv2d.weight", "conv3d.weight"], 1
        )

    def test_transposed_convolutions(self) -> None:
        model = MixedTypes(
            a=nn.ConvTranspose1d(8, 4, 3), b=nn.ConvTranspose2d(8, 4, 3), c=nn.ConvTranspose3d(8, 4, 3)
        )
        assert group_dims(model) == {"a.weight": 0, "b.weight": 0, "c.weight": 0}

    def test_attention(self) -> None:
        model = MixedTypes(
            same=nn.MultiheadAttention(8, 2), other=nn.MultiheadAttention(8, 2, kdim=12, vdim=16)
        )
        assert group_dims(model) == {
            "same.in_proj_weight": 1,
            "same.out_proj.weight": 1,
            "other.q_proj_weight": 1,
            "other.k_proj_weight": 1,
            "other.v_proj_weight": 1,
            "other.out_proj.weight": 1,
        }

    def test_recurrent(self) -> None:
        model = MixedTypes(
            lstm=nn.LSTM(8, 4, num_layers=2, bidirectional=True, proj_size=2),
            gru=nn.GRU(8, 4),
            rnn=nn.RNN(8, 4),
            cell=nn.LSTMCell(8, 4),
        )
        lstm = [
            f"lstm.weight_{kind}_l{layer}{suffix}"
            for layer in (0, 1)
            for suffix in ("", "_reverse")
            for kind in ("ih", "hh", "hr")
        ]
        others = [f"{name}.weight_{kind}_l0" for name in ("gru", "rnn") for kind in ("ih", "hh")]
        assert group_dims(model) == dict.fromkeys([*lstm, *others, "cell.weight_ih", "cell.weight_hh"], 1)

    def test_embeddings_stay_dense_unless_named(self) -> None:
        model = MixedTypes(embedding=nn.Embedding(10, 8), bag=nn.EmbeddingBag(10, 8))
        for weight in weights(model):
            assert weight.group_dim == 1
            assert weight.dense_because == "embeddings stay dense unless named"
        assert not list(prunable_weights(model))

    def test_unknown_types_say_so(self) -> None:
        (weight,) = weights(MixedTypes(bilinear=nn.Bilinear(4, 4, 4)))
        assert weight.group_dim is None
        assert weight.dense_because == "Bilinear.weight is not in the registry (register_module)"

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64, torch.float8_e5m2])
    def test_dtypes_that_cannot_be_pruned_say_so(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        model[0].weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
        (weight,) = weights(model)
        assert weight.dense_because == f"weights of dtype {dtype} cannot be pruned"
        assert list(prunable_weights(model)) == []

    def test_subclasses_inherit(self) -> None:
        class Wide(nn.Linear):
            pass

        class Both(Wide, nn.Identity):
            pass

        assert group_dims(MixedTypes(a=Wide(8, 4), b=Both(8, 4))) == {"a.weight": 1, "b.weight": 1}

    def test_lazy_modules(self) -> None:
        model = nn.Sequential(nn.LazyLinear(4))
        with pytest.raises(ValueError, match=r"0\.weight is not initialised yet"):
            weights(model)
        model(torch.zeros(2, 8))
        assert group_dims(model) == {"0.weight": 1}


class TestFit:
    """Where groups may lie: ``misfit`` says why not."""

    @pytest.mark.parametrize(
        ("module", "pattern", "reason"),
        [
            (nn.Linear(8, 4), "2:4", None),
            (nn.Linear(8, 4), "4:8", None),
            (nn.Linear(6, 4), "2:4", "group dim 1 has 6 weights, not a multiple of m = 4"),
            (nn.Linear(3, 4), "2:4", "group dim 1 has 3 weights, fewer than m = 4"),
            (nn.Linear(3, 4), "4:4", None),
            (nn.Conv2d(8, 8, 3, groups=2), "2:4", None),
            (nn.Conv2d(8, 8, 3, groups=4), "2:4", "group dim 1 has 2 weights, fewer than m = 4"),
            (nn.Conv2d(8, 8, 3, groups=8), "2:4", "group dim 1 has 1 weights, fewer than m = 4"),
            (nn.ConvTranspose2d(8, 8, 3), "4:8", None),
            # Two conv groups of four input channels each, one after the other in dim 0.
            (nn.ConvTranspose2d(8, 8, 3, groups=2), "2:4", None),
            (
                nn.ConvTranspose2d(8, 8, 3, groups=2),
                "4:8",
                "group dim 0 has 8 weights in parts of 4, fewer than m = 8",
            ),
            (
                nn.ConvTranspose2d(12, 8, 3, groups=2),
                "2:4",
                "group dim 0 has 12 weights in parts of 6, not a multiple of m = 4",
            ),
            (nn.Bilinear(4, 4, 4), "2:4", "Bilinear.weight is not in the registry (register_module)"),
        ],
    )
    def test_misfit(self, module: nn.Module, pattern: str, reason: str | None) -> None:
        (weight,) = weights(module)
        assert weight.misfit(Pattern.parse(pattern)) == reason


class TestNames:
    @pytest.mark.parametrize(
        ("name", "canonical"),
        [
            ("fc.weight", "fc.weight"),
            ("module.fc.weight", "fc.weight"),
            ("_orig_mod.module.fc.weight", "fc.weight"),
            ("layer._checkpoint_wrapped_module.fc.weight", "layer.fc.weight"),
            ("_fsdp_wrapped_module.fc._orig_mod.weight", "fc.weight"),
            ("modules.fc_module.weight", "modules.fc_module.weight"),
            ("module", ""),
            ("", ""),
        ],
    )
    def test_canonical_name(self, name: str, canonical: str) -> None:
        assert canonical_name(name) == canonical

    def test_wrappers(self) -> None:
        def names(model: nn.Module) -> list[str]:
            return [weight.name for weight in weights(model)]

        def make() -> nn.Sequential:
            return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)))

        plain = names(make())
        assert plain == ["0.weight", "1.0.weight"]
        assert names(nn.DataParallel(make())) == plain
        assert names(torch.compile(make())) == plain
        assert names(torch.optim.swa_utils.AveragedModel(make())) == plain
        inner = make()
        inner[1] = torch.compile(checkpoint_wrapper(inner[1]))
        assert names(nn.DataParallel(inner)) == plain

    def test_distributed_wrappers(self) -> None:
        from torch.distributed.fsdp import fully_shard

        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            ddp = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 4)))
            assert group_dims(ddp) == {"0.weight": 1}
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
            sharded = nn.Sequential(nn.Linear(8, 4), nn.ConvTranspose1d(4, 4, 3))
            for module in (*sharded, sharded):
                fully_shard(module, mesh=mesh)
            assert group_dims(sharded) == {"0.weight": 1, "1.weight": 0}
        finally:
            torch.distributed.destroy_process_group()

    def test_a_bare_module(self) -> None:
        assert group_dims(nn.Linear(8, 4)) == {"weight": 1}

    def test_names_that_collide_without_wrapper_parts(self) -> None:
        model = MixedTypes(fc=nn.Linear(8, 4), module=MixedTypes(fc=nn.Linear(8, 4)))
        with pytest.raises(ValueError, match=r"fc\.weight and module\.fc\.weight would both be called fc\.w"):
            weights(model)

    def test_no_module(self) -> None:
        with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
            weights({})  # type: ignore[arg-type]


class TestTied:
    def test_listed_once_under_all_names(self) -> None:
        model = MixedTypes(a=nn.Linear(8, 8), b=nn.Linear(8, 8))
        model.b.weight = model.a.weight
        (weight,) = weights(model)
        assert (weight.name, weight.names) == ("a.weight", ("a.weight", "b.weight"))
        assert weight.places == ((model.a, "weight"), (model.b, "weight"))
        assert weight.parameter is model.a.weight

    def test_a_module_held_twice(self) -> None:
        model = MixedTypes(a=nn.Linear(8, 8))
        model.b = model.a
        (weight,) = weights(model)
        assert weight.names == ("a.weight", "b.weight")
        assert weight.places == ((model.a, "weight"),)

    def test_tied_to_an_embedding(self) -> None:
        model = MixedTypes(embedding=nn.Embedding(10, 8), head=nn.Linear(8, 10, bias=False))
        model.head.weight = model.embedding.weight
        (weight,) = weights(model)
        assert weight.name == "embedding.weight"
        assert weight.module is model.head  # the place that multiplies with it
        assert weight.dense_because == "tied to embedding.weight: embeddings stay dense unless named"
        assert weight.group_dim == 1

    def test_tied_across_group_dims(self) -> None:
        model = MixedTypes(a=nn.Linear(8, 8), b=nn.ConvTranspose1d(8, 8, 1))
        model.a.weight = nn.Parameter(torch.zeros(8, 8, 1))
        model.b.weight = model.a.weight
        (weight,) = weights(model)
        assert weight.group_dim is None
        assert weight.dense_because == "tied, but not with the same group dim: a.weight, b.weight"
        assert weight.misfit(Pattern(2, 4)) == weight.dense_because


class Experts(nn.Module):
    """An unknown type with weights [experts, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.w_up = nn.Parameter(torch.zeros(2, 8, 4))
        self.w_down = nn.Parameter(torch.zeros(2, 4, 8))
        self.scale = nn.Parameter(torch.zeros(2, 8))


class TestRegister:
    def test_3d_weights_of_unknown_types_stay_dense(self) -> None:
        assert group_dims(Experts()) == {}

    def test_by_type_and_glob(self) -> None:
        register_module(Experts, {"w_*": 1})
        assert group_dims(Experts()) == {"w_up": 1, "w_down": 1}

    def test_negative_dims(self) -> None:
        register_module(Experts, {"w_*": -2})
        assert group_dims(Experts()) == {"w_up": 1, "w_down": 1}

    def test_by_qualified_name_and_for_subclasses(self) -> None:
        class Special(Experts):
            pass

        register_module(f"{Experts.__module__}.Experts", {"w_up": 1})
        assert group_dims(Special()) == {"w_up": 1}

    def test_exact_names_go_before_globs(self) -> None:
        register_module("*Experts", {"w_up": 2})
        register_module(f"{Experts.__module__}.Experts", {"w_up": 1})
        assert group_dims(Experts()) == {"w_up": 1}

    def test_exact_parameters_go_before_globs(self) -> None:
        register_module(Experts, {"w_*": 2, "w_down": 1})
        assert group_dims(Experts()) == {"w_up": 2, "w_down": 1}

    def test_the_nearest_base_counts(self) -> None:
        class Flipped(Experts):
            pass

        register_module(Experts, {"w_*": 1})
        register_module(Flipped, {"w_up": 2})
        assert group_dims(Flipped()) == {"w_up": 2}

    def test_functions(self) -> None:
        register_module(Experts, {"w_*": lambda module, w: (0, 1) if w.shape[1] == 8 else None})
        (weight,) = prunable_weights(Experts())
        assert (weight.name, weight.group_dim, weight.span) == ("w_up", 0, 1)

    def test_dims_are_checked(self) -> None:
        register_module(Experts, {"w_*": 3})
        with pytest.raises(
            ValueError, match=r"w_up: the registry gives it group dim 3, but its shape is \(2, 8, 4\)"
        ):
            weights(Experts())

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((Experts(), {"w": 1}), "module_type must be an nn.Module type or its qualified name"),
            ((int, {"w": 1}), "module_type must be an nn.Module type"),
            ((Experts, ["w"]), "group_dims must map parameter names to group dims"),
            ((Experts, {1: 1}), "group_dims must have parameter names as keys, got 1"),
            ((Experts, {"w": "1"}), r"group_dims\['w'\] must be an int or a function, got '1'"),
            ((Experts, {"w": True}), r"group_dims\['w'\] must be an int or a function, got True"),
        ],
    )
    def test_bad_arguments(self, args: tuple, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            register_module(*args)


class TestTransformers:
    """Types of a package that is not imported; skipped without it."""

    @pytest.fixture(autouse=True)
    def _transformers(self) -> None:
        pytest.importorskip("transformers", reason="transformers is not installed")

    def test_gpt2_conv1d(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        found = {weight.name: weight for weight in weights(model)}
        attention = found["transformer.h.0.attn.c_attn.weight"]
        assert tuple(attention.parameter.shape) == (8, 24)  # [in, out]
        assert attention.group_dim == 0
        tied = found["transformer.wte.weight"]
        assert tied.names == ("transformer.wte.weight", "lm_head.weight")
        assert tied.dense_because is not None
        assert all(weight.group_dim == 0 for weight in found.values() if ".h." in weight.name)

    @pytest.mark.parametrize(
        ("model_type", "class_name"),
        [
            ("mixtral", "MixtralExperts"),
            ("qwen3_moe", "Qwen3MoeExperts"),
            ("llama4", "Llama4TextExperts"),
            ("gpt_oss", "GptOssExperts"),
        ],
    )
    def test_experts(self, model_type: str, class_name: str) -> None:
        """The group dim is the one whose size the layer's input has, whatever the layout."""
        import importlib

        transformers = importlib.import_module("transformers")
        name = f"transformers.models.{model_type}.modeling_{model_type}"
        try:
            experts_type = getattr(importlib.import_module(name), class_name)
        except (ImportError, AttributeError):
            pytest.skip(f"this release of transformers has no {class_name}")
        config_type = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
        sizes = {"hidden_size": 24, "intermediate_size": 20, "moe_intermediate_size": 20}
        counts = {"num_local_experts": 3, "num_experts": 3}
        config = config_type(**sizes, **counts) if model_type != "llama4" else None
        if config is None:
            from transformers import Llama4TextConfig

            config = Llama4TextConfig(**sizes, **counts)
        found = {
            weight.name: weight for weight in weights(experts_type(config)) if weight.parameter.dim() == 3
        }
        sizes_along = {
            name: weight.parameter.shape[weight.group_dim]
            for name, weight in found.items()
            if weight.group_dim is not None
        }
        assert sizes_along == {"gate_up_proj": 24, "down_proj": 20}
        assert all(weight.dense_because is None for weight in found.values())

    def test_dbrx_experts_lie_below_each_other(self) -> None:
        from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

        module = nn.Module()
        module.__class__ = DbrxExpertGLU
        module.ffn_hidden_size = 6
        for name in ("w1", "v1", "w2"):
            module.register_parameter(name, nn.Parameter(torch.zeros(2 * 6, 8)))
        found = {weight.name: (weight.group_dim, weight.span) for weight in weights(module)}
        assert found == {"w1": (1, 8), "v1": (1, 8), "w2": (0, 6)}
