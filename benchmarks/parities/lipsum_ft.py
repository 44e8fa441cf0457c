"""Lipsum-FT's loss against its released code (cs-giung/lipsum-ft), which is JAX.

scripts/Lipsum-FT.py defines its loss inside its training function and imports TensorFlow's data
sets, Flax and transformers, so only the function `loss_fn` is extracted from the file and called
unchanged. Its surroundings are provided here: `jax`, JAX's NumPy namespace, one-hot labels
(flax.training.common_utils), towers that are one random matrix each in place of the transformers,
and its defaults. Random tokens, their text features, both losses and JAX's gradients are the
released code's. Needs `jax` (pip install jax).
"""

import ast
import collections
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import parities
from rft.config import MethodConfig
from rft.method import losses
from rft.recipes import build

REPOSITORY = "cs-giung/lipsum-ft"
VARIABLE = "RFT_PEER_LIPSUM_FT"
IMAGES, PIXELS, FEATURES, CLASSES, VOCABULARY, WIDTH = 12, 40, 24, 7, 49408, 16
LOG_SCALE = 4.0


def measure(checkout: Path) -> dict[str, float]:
    """Compute loss and gradients of the same features, labels and texts with both."""
    # imported here, because rft does not need it
    import jax  # pyrefly: ignore[missing-import]

    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.standard_normal((IMAGES, PIXELS), dtype=np.float32),
        "tower": rng.standard_normal((PIXELS, FEATURES), dtype=np.float32),
        "start": rng.standard_normal((PIXELS, FEATURES), dtype=np.float32),
        "head": 0.3 * rng.standard_normal((FEATURES, CLASSES), dtype=np.float32),
        "words": rng.standard_normal((VOCABULARY, WIDTH), dtype=np.float32),
        "projection": rng.standard_normal((WIDTH, FEATURES), dtype=np.float32),
    }
    labels_B = rng.integers(CLASSES, size=IMAGES)
    loss_fn, seen = their_loss(checkout, jax, arrays, labels_B)
    params = {"cls": jax.numpy.asarray(arrays["head"]), "ext": jax.numpy.asarray(arrays["tower"])}
    (loss, terms), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    ours = our_loss(arrays, labels_B, torch.from_numpy(np.asarray(seen["texts"]).copy()))
    theirs = {
        "loss": loss,
        "cross-entropy": terms["negative_log_likelihood"],
        "distance of random texts": terms["feat_regularization"],
        "gradient of the tower": gradients["ext"],
        "gradient of the head": gradients["cls"],
    }
    found = {
        name: parities.difference(ours[name], torch.from_numpy(np.asarray(value).copy()))
        for name, value in theirs.items()
    }
    tokens_MT = np.asarray(seen["tokens"])
    assert tokens_MT.shape == (80, 10), "80 texts of 8 tokens between start and end"
    return found


def their_loss(
    checkout: Path, jax: Any, arrays: dict[str, np.ndarray], labels_B: np.ndarray
) -> tuple[Any, dict[str, Any]]:
    """Return the released loss function, and where it stores the tokens and texts of a call."""
    tree = ast.parse((checkout / "scripts/Lipsum-FT.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    (function,) = (node for node in functions if node.name == "loss_fn")
    seen: dict[str, Any] = {}

    def text_model(tokens_MT: Any) -> Any:
        pooled_MW = jax.numpy.asarray(arrays["words"])[tokens_MT].mean(axis=1)
        features_ME = pooled_MW @ arrays["projection"]
        norms_M1 = jax.numpy.linalg.norm(features_ME, axis=-1, keepdims=True)
        seen.update(tokens=tokens_MT, texts=features_ME / norms_M1)
        return types.SimpleNamespace(pooler_output=pooled_MW)

    def get_features(images_BV: Any, tower_VE: Any) -> Any:
        features_BE = images_BV @ tower_VE
        return features_BE / jax.numpy.linalg.norm(features_BE, axis=-1, keepdims=True)

    around = {
        "jax": jax,
        "jnp": jax.numpy,
        "OrderedDict": collections.OrderedDict,
        "common_utils": types.SimpleNamespace(onehot=jax.nn.one_hot),
        "config": types.SimpleNamespace(
            token_k_ways=80, token_length=8, optim_label_smoothing=0.0, feat_regularization=1.0
        ),
        "text_rng": jax.random.PRNGKey(0),
        "clip_text_model": text_model,
        "clip_text_projection": jax.numpy.asarray(arrays["projection"]),
        "get_features": get_features,
        "initial_ext_params": jax.numpy.asarray(arrays["start"]),
        "pretrained_params": {"logit_scale": LOG_SCALE},
        "batch": {"images": jax.numpy.asarray(arrays["images"]), "labels": labels_B},
        "NUM_CLASSES": CLASSES,
    }
    exec(compile(ast.Module([function], []), "Lipsum-FT.py", "exec"), around)  # noqa: S102
    return around["loss_fn"], seen


def our_loss(
    arrays: dict[str, np.ndarray], labels_B: np.ndarray, texts_ME: Tensor
) -> dict[str, Tensor]:
    """Compute the same terms and gradients with rft's functions."""
    own = {name: torch.from_numpy(value) for name, value in arrays.items()}
    tower, head = own["tower"].requires_grad_(), own["head"].requires_grad_()
    scale = torch.tensor(LOG_SCALE).exp()
    student_BE, teacher_BE = own["images"] @ tower, own["images"] @ own["start"]
    # the scale is folded into the head that rft trains
    logits_BK = F.normalize(student_BE, dim=-1) @ head * scale
    method: MethodConfig = build("lipsum-ft").method
    zero = torch.zeros(())
    terms = {
        "ce": losses.classification(logits_BK, torch.from_numpy(labels_B)),
        "lipsum": losses.random_text_distance(student_BE, teacher_BE, scale * texts_ME),
        "kd": zero,
        "mse": zero,
    }
    loss = losses.total(method, terms)
    of_tower, of_head = torch.autograd.grad(loss, [tower, head])
    return {
        "loss": loss.detach(),
        "cross-entropy": terms["ce"].detach(),
        "distance of random texts": terms["lipsum"].detach(),
        "gradient of the tower": of_tower,
        "gradient of the head": of_head,
    }
