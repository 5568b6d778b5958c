"""timm reads the exported folder."""

import pytest
import timm
import torch

from peft_pretraining.vision.export import export, timm_config
from peft_pretraining.vision.models import build_model
from tests.support.vision import arguments


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "convnext_atto"])
def test_timm_loads_an_export(tmp_path, name):
    args = arguments("--model", name)
    model = build_model(args).eval()
    export(model, timm_config(args, model), {"top1": 1.0}, tmp_path / "best")
    image = torch.randn(2, 3, 32, 32)
    size = {"img_size": 32} if name == "test_vit" else {}
    for loaded in (
        timm.create_model(
            name, num_classes=4, checkpoint_path=str(tmp_path / "best/model.safetensors"), **size
        ),
        timm.create_model(f"local-dir:{tmp_path}/best", pretrained=True),
    ):
        assert torch.equal(loaded.eval()(image), model(image))
        assert loaded.num_classes == 4
