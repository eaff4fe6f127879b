"""The common tests of transformers' models, from its sdist, on small ones that carry a drop: see attach_everywhere.py.

The folder of the unpacked sdist is on the path. Its tests import two mixins that it lacks, for exporters and for
generation; none of the models here needs them.
"""

import sys
import types
import unittest

import torch
import transformers as tf

for package, name, mixin in (("exporters", "test_export", "ExportTesterMixin"),
                             ("generation", "test_utils", "GenerationTesterMixin")):  # fmt: skip
    absent = types.ModuleType(f"tests.{package}.{name}")
    setattr(absent, mixin, type(mixin, (), {}))
    sys.modules[f"tests.{package}"] = types.ModuleType(f"tests.{package}")
    sys.modules[absent.__name__] = absent

from tests.test_modeling_common import ModelTesterMixin  # noqa: E402

SMALL = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


class Tester:
    """What the common tests ask a family for."""

    batch_size, hidden_size, num_hidden_layers, num_attention_heads = 3, 32, 2, 4
    image_size, patch_size, num_masks, mask_length = 16, 4, 8, 16

    def __init__(self, config_class, num_extra_tokens, settings):
        self.config_class, self.settings = config_class, settings
        self.is_training = config_class is not tf.CLIPVisionConfig  # whose towers have no loss
        self.seq_length = 16 + num_extra_tokens

    def get_config(self):
        return self.config_class(**(SMALL | self.settings))

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, 16, 16)}


class VisionTests(ModelTesterMixin):
    test_resize_embeddings = False
    test_all_params_have_gradient = False  # DINOv2's mask token has none, which is none of the drop's doing

    @unittest.skip("no input_ids")
    def test_inputs_embeds(self):
        pass

    def test_model_get_set_embeddings(self):
        model = self.all_model_classes[0](self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), torch.nn.Module)


def family(config_class, classes, num_extra_tokens, **settings):
    tester = Tester(config_class, num_extra_tokens, settings)
    return type(
        classes[0].__name__,
        (VisionTests, unittest.TestCase),
        {"all_model_classes": classes, "setUp": lambda self: setattr(self, "model_tester", tester)},
    )


TestViT = family(tf.ViTConfig, (tf.ViTModel, tf.ViTForImageClassification), 1)
TestCLIP = family(tf.CLIPVisionConfig, (tf.CLIPVisionModel, tf.CLIPVisionModelWithProjection), 1)
TestDinov2 = family(tf.Dinov2Config, (tf.Dinov2Model, tf.Dinov2ForImageClassification), 1)
TestDINOv3 = family(tf.DINOv3ViTConfig, (tf.DINOv3ViTModel,), 3, num_register_tokens=2)
TestSiglip = family(tf.SiglipVisionConfig, (tf.SiglipVisionModel,), 0)
TestBeit = family(
    tf.BeitConfig, (tf.BeitModel, tf.BeitForImageClassification), 1, use_relative_position_bias=True
)  # fmt: skip
