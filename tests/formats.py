"""Weights of one tiny CLIP in the formats of third-party code.

The towers are OpenAI's (QuickGELU, heads 64 wide), which most of that code requires.
"""

import json
import pickle
import sys
import types
import warnings
from collections import OrderedDict
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torchvision import transforms

NAME = "ViT-tiny-4-quickgelu"
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"layers": 2, "width": 64, "patch_size": 4, "image_size": 16},
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 64,
        "heads": 1,
        "layers": 1,
    },
}
# same shapes, so only the activation distinguishes them
GELU_NAME, GELU_CONFIG = "ViT-tiny-4", {k: v for k, v in CONFIG.items() if k != "quick_gelu"}
OTHER_NAME = "ViT-tiny-8-quickgelu"
OTHER_CONFIG = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "patch_size": 8}}
CLASSES = 4


@pytest.fixture
def known_models(monkeypatch):
    """Registers the tiny models in open_clip by name."""
    configs = {NAME: CONFIG, GELU_NAME: GELU_CONFIG, OTHER_NAME: OTHER_CONFIG}
    for name, config in configs.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)


def build_clip(seed: int = 0, dtype: torch.dtype | None = None) -> CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(**CONFIG, cast_dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 and name != "logit_scale":  # all zero or one otherwise
                nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    return model.eval()


def build_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Image tower and head under rft's names."""
    draw = torch.Generator().manual_seed(seed)
    state = {k: v for k, v in build_clip(seed).state_dict().items() if k.startswith("visual.")}
    state["head.weight"] = torch.randn(CLASSES, CONFIG["embed_dim"], generator=draw) * 10
    state["head.bias"] = torch.randn(CLASSES, generator=draw)
    return {name: value.clone() for name, value in state.items()}


def write_openai(path: Path, seed: int = 0) -> CLIP:
    """A TorchScript archive, mostly fp16, with OpenAI's three numbers among its weights."""
    model = build_clip(seed, torch.float16)
    convert_weights_to_lp(model)
    numbers = {"input_resolution": 16, "context_length": 12, "vocab_size": 49408}
    for name, number in numbers.items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(number))
    example = (torch.rand(1, 3, 16, 16).half(), torch.ones(1, 12, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, example, check_trace=False), str(path))
    return model


def write_open_clip_checkpoint(path: Path, seed: int = 0, prefix: str = "module.") -> None:
    """The file that open_clip's training script saves after an epoch."""
    model = build_clip(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    content = {"epoch": 3, "name": "a-run", "state_dict": state}
    torch.save({**content, "optimizer": optimizer.state_dict(), "scaler": {"scale": 65536.0}}, path)


def write_released(path: Path, state: dict[str, torch.Tensor]) -> None:
    """The file that the released code saves, with an optimizer and torch 1.11's scheduler."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = OneCycleLR(optimizer, max_lr=1.0, total_steps=10).state_dict()
    # that version stored the function itself
    schedule |= {"anneal_func": OneCycleLR._annealing_cos, "_schedule_phases": [{"end_step": 3.0}]}
    rename = {"visual.": "backbone.", "head.": "classifier."}
    content = {
        "epoch": 9,
        "best_value": 77.5,
        "_data_counters": [10, 10, 0, 10],
        "model": OrderedDict(renamed(state, rename)),
        "optimizer": {
            "optimizer": optimizer.state_dict(),
            "scheduler": schedule,
            "schedule_step": "iter",
        },
        "test_acc": 76.9,
    }
    torch.save(content, path)


def write_model_soups(path: Path, state: dict[str, torch.Tensor]) -> None:
    rename = {"visual.": "model.visual.", "head.": "classification_head."}
    torch.save({**leftovers("model."), **renamed(state, rename)}, path)


def renamed(state: dict, prefixes: dict[str, str]) -> dict:
    return {
        new + name.removeprefix(old): value
        for name, value in state.items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }


def leftovers(prefix: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The rest of the text tower after its transformer is deleted."""
    text = {k: v for k, v in build_clip(seed).state_dict().items() if not k.startswith("visual.")}
    return {f"{prefix}{k}": v for k, v in text.items() if not k.startswith("transformer.")}


def write_wise_ft(path: Path, state: dict[str, torch.Tensor], *, normalize: bool = True) -> None:
    """A complete ImageClassifier, pickled, with classes in modules that exist only meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        modules = wise_ft_modules()
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        classes = modules["src.models.modeling"]
        tower = renamed(state, {"visual.": "visual."})
        clip = plant(modules["clip.model"].CLIP, {**leftovers(""), **tower})
        head = nn.Linear(CONFIG["embed_dim"], CLASSES)
        head.__class__ = classes.ClassificationHead
        head.normalize = normalize
        encoder, whole = classes.ImageEncoder(), classes.ImageClassifier()
        encoder.model, encoder.cache_dir = clip, None
        encoder.train_preprocess = encoder.val_preprocess = transforms.Compose(
            [
                transforms.Resize(16, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(16),
                modules["clip.clip"]._convert_image_to_rgb,
                transforms.ToTensor(),
                transforms.Normalize((0.48, 0.45, 0.4), (0.26, 0.26, 0.27)),
            ]
        )
        whole.image_encoder, whole.classification_head = encoder, head
        whole.process_images, whole.val_preprocess = True, encoder.val_preprocess
        head.load_state_dict({k.removeprefix("head."): state[k] for k in state if "head." in k})
        with path.open("wb") as stream:
            pickle.dump(whole, stream)
    assert "src.models.modeling" not in sys.modules


def wise_ft_modules() -> dict[str, types.ModuleType]:
    modules = {
        name: types.ModuleType(name)
        for name in ("src", "src.models", "src.models.modeling", "clip", "clip.model", "clip.clip")
    }
    bases = {
        "src.models.modeling": {
            "ImageEncoder": nn.Module,
            "ImageClassifier": nn.Module,
            "ClassificationHead": nn.Linear,
        },
        "clip.model": {
            "CLIP": nn.Module,
            "VisionTransformer": nn.Module,
            "Transformer": nn.Module,
            "ResidualAttentionBlock": nn.Module,
            "LayerNorm": nn.LayerNorm,
            "QuickGELU": nn.Module,
        },
    }
    for module, classes in bases.items():
        for name, base in classes.items():
            made = type(name, (base,), {"__module__": module})
            setattr(modules[module], name, made)

    def _convert_image_to_rgb(image):
        return image.convert("RGB")

    _convert_image_to_rgb.__module__ = "clip.clip"
    _convert_image_to_rgb.__qualname__ = "_convert_image_to_rgb"
    modules["clip.clip"]._convert_image_to_rgb = _convert_image_to_rgb
    return modules


def plant(root: type[nn.Module], state: dict[str, torch.Tensor]) -> nn.Module:
    """A tree of modules that holds these parameters, with the classes of clip.model."""
    classes = sys.modules["clip.model"]
    kinds = {
        "visual": classes.VisionTransformer,
        "transformer": classes.Transformer,
        "attn": nn.MultiheadAttention,
        "mlp": nn.Sequential,
        "resblocks": nn.Sequential,
        "conv1": nn.Conv2d,
        **dict.fromkeys(("ln_1", "ln_2", "ln_pre", "ln_post", "ln_final"), classes.LayerNorm),
    }
    tree = root()
    for name, value in state.items():
        *path, leaf = name.split(".")
        node = tree
        for step in path:
            if step not in node._modules:
                kind = classes.ResidualAttentionBlock if step.isdigit() else kinds.get(step)
                made = nn.Module.__new__(kind or nn.Linear)
                nn.Module.__init__(made)  # their own constructors would create parameters
                node.add_module(step, made)
            node = node._modules[step]
        node.register_parameter(leaf, nn.Parameter(value.clone()))
    return tree


def write_hub_folder(folder: Path, seed: int = 0) -> None:
    folder.mkdir()
    save_file(build_clip(seed).state_dict(), folder / "open_clip_model.safetensors")
    document = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
