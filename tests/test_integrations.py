"""Trainers of others: the page docs/integrations.md, and a test behind every row of its table.

peft and lightning are in the group `test`. deepspeed, lightly and torchao are in the group `integrations`, which
`nox -s integrations` installs; elsewhere their tests are skipped.
"""

import copy
import itertools
import re
from functools import partial
from typing import Any, NamedTuple

import lightning
import processes
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from hosts import VISION, make_hf, make_naflex, make_timm, x_images
from pages import ROOT, blocks, run
from peft import LoraConfig, get_peft_model
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import gaussmask
from gaussmask import GaussianPatchDropout, RandomPatchDropout, UnsupportedModelError
from gaussmask.functional import sample_keep_indices

pytestmark = [
    # PEFT asks transformers' models by the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Lightning: advice, and what it calls of torch.
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*is deprecated"),
    # Trainer pins memory by default, also where there is no GPU.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
    # torch has no vmap rule for its fused attention on the CPU, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning"),
]
ALL_TOKENS, KEPT_TOKENS = 37, 19  # a class token and 36 patches, or half of them
both_stages = pytest.mark.parametrize("stage", ["tokens", "pixels"])
make_vit = partial(make_hf, "ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 5})
MODELS = {"timm": make_timm, "transformers": make_vit}
both_libraries = pytest.mark.parametrize("library", MODELS)


def logits(output):
    return output if torch.is_tensor(output) else output.logits


def batch(size=4):
    torch.manual_seed(5)
    return torch.randn(size, 3, 48, 48), torch.randint(5, (size,))


class Forward(NamedTuple):
    """One forward as somebody else's program ran it."""

    training: bool
    weights: dict[str, torch.Tensor]
    state: torch.Tensor  # of the generator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: int  # that reached the first block
    kept: torch.Tensor | None
    output: torch.Tensor


class Recorder:
    """Watches a model in the hands of a trainer."""

    def __init__(self, model, drop):
        self.drop = drop
        self.forwards: list[Forward] = []
        first_block = next(module for name, module in model.named_modules() if re.search(r"(blocks|layers?)\.0$", name))
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            first_block.register_forward_pre_hook(self.count),
            model.register_forward_hook(self.after),
        ]

    def before(self, model, args, kwargs):
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.call = (model.training, weights, torch.get_rng_state(), args, kwargs)

    def count(self, block, args):
        self.tokens = args[0].shape[1]

    def after(self, model, args, output):
        kept = self.drop.keep_indices
        self.forwards.append(Forward(*self.call, self.tokens, kept, logits(output).detach()))

    def tokens_of(self, training):
        return [forward.tokens for forward in self.forwards if forward.training == training]


def check_against_no_trainer(forwards, make):
    """Every forward in training mode kept what the same seed keeps without the trainer, and computed the same.

    At stage "tokens", whichever the trainer had.
    """
    for forward in forwards:
        drop = RandomPatchDropout(0.5)
        model = gaussmask.attach(make(), drop)
        model.load_state_dict(forward.weights)
        torch.set_rng_state(forward.state)
        output = logits(model.train(forward.training)(*forward.args, **forward.kwargs))
        if forward.training:
            assert torch.equal(drop.keep_indices, forward.kept)
        else:
            assert forward.kept is None
        torch.testing.assert_close(output, forward.output)


def gradients(model):
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


# The page


PAGE = (ROOT / "docs" / "integrations.md").read_text("utf-8")
INTRODUCTION, *SECTIONS = re.split(r"^(?=## )", PAGE, flags=re.MULTILINE)
SECTIONS = {section.partition("\n")[0][3:]: section for section in SECTIONS}
NEEDS = {"DeepSpeed": "deepspeed", "torchao": "torchao", "lightly": "lightly"}


@pytest.mark.parametrize("title", SECTIONS)
def test_the_python_of_the_page(title, capsys, tmp_path, monkeypatch):
    """Each section in a session of its own, behind the imports on top."""
    if title in NEEDS:
        pytest.importorskip(NEEDS[title], reason="in the dependency group integrations")
    monkeypatch.chdir(tmp_path)
    if title == "DeepSpeed":
        start_process(monkeypatch, run_section, title)
    else:
        run(blocks(INTRODUCTION + SECTIONS[title]), title, lambda: capsys.readouterr().out)


def start_process(monkeypatch, function, *args):
    """One, as a launcher starts it: what DeepSpeed sets up for a process cannot be taken back."""
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    processes.spawn(function, args, nprocs=1)


def run_section(rank, title):
    run(blocks(INTRODUCTION + SECTIONS[title]), title, lambda: "")


def test_every_row_of_the_table_names_its_test():
    rows = re.findall(r"^\|(.*)\|$", INTRODUCTION, flags=re.MULTILINE)[2:]
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-1])
        assert all(callable(globals().get(name)) for name in named), row
        assert named or "recipes.md#" in row, row
    ours = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert len(rows) > 10
    assert len(ours) > 10


# Training loops


@both_stages
def test_timms_training_loop(stage):
    """In the order of timm's train.py: attach behind create_model, then optimizer, scaler, running mean."""
    model = make_timm()

    drop = RandomPatchDropout(mask_ratio=0.5)
    gaussmask.attach(model, drop, stage=stage)

    model.set_grad_checkpointing(enable=True)
    recorder = Recorder(model, drop)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    loss_scaler = NativeScaler(device="cpu")
    model_ema = ModelEmaV3(model, decay=0.5)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5)
    before = copy.deepcopy(model.state_dict())
    model.train()
    for step in range(2):
        images, targets = mixup(*batch())
        loss = SoftTargetCrossEntropy()(model(images), targets)
        optimizer.zero_grad()
        loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        model_ema.update(model, step=step)
    assert gradients(model) == {name for name, _ in model.named_parameters()}
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())

    images, _ = batch()
    with torch.no_grad():
        model.eval()(images)
        averaged = model_ema.eval()(images)
    assert recorder.tokens_of(training=True) == [KEPT_TOKENS] * 2
    assert recorder.tokens_of(training=False) == [ALL_TOKENS]
    check_against_no_trainer(recorder.forwards, make_timm)
    plain = make_timm()
    plain.load_state_dict(model_ema.module.state_dict())
    torch.testing.assert_close(averaged, plain.eval()(images))


@both_stages
def test_trainer_of_transformers(stage, tmp_path):
    images, labels = batch(8)
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    model, drop = make_vit().eval(), RandomPatchDropout(0.5)  # as from_pretrained returns it
    gaussmask.attach(model, drop, stage=stage)
    recorder = Recorder(model, drop)
    settings = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to="none",
        disable_tqdm=True, use_cpu=True, eval_strategy="steps", eval_steps=1, save_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert recorder.tokens_of(training=True) == [KEPT_TOKENS] * 2
    assert recorder.tokens_of(training=False) == [ALL_TOKENS] * 4
    check_against_no_trainer(recorder.forwards, make_vit)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert saved.state_dict().keys() == make_vit().state_dict().keys()
    torch.testing.assert_close(saved(images).logits, model.eval()(images).logits)


class Classifier(lightning.LightningModule):
    def __init__(self, drop, stage):
        super().__init__()
        self.model = gaussmask.attach(make_timm(), drop, stage=stage)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch, batch_idx):
        self.model(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def lightning_trainer(**settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(max_epochs=2, num_sanity_val_steps=0, **quiet, **settings)


@both_stages
def test_lightning(stage, tmp_path):
    drop = RandomPatchDropout(0.5)
    module = Classifier(drop, stage)
    recorder = Recorder(module.model, drop)
    loader = DataLoader(TensorDataset(*batch(4)), batch_size=4)
    trainer = lightning_trainer(enable_checkpointing=False)
    trainer.fit(module, loader, loader)
    assert [forward.tokens for forward in recorder.forwards] == [KEPT_TOKENS, ALL_TOKENS] * 2
    check_against_no_trainer(recorder.forwards, make_timm)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    make_timm().load_state_dict({name.removeprefix("model."): value for name, value in saved.items()})


def test_lightning_leaves_a_model_in_eval_mode():
    """As the page says: a model of from_pretrained has to be put into training mode."""
    drop = RandomPatchDropout(0.5)
    module = Classifier(drop, "tokens")
    module.model.eval()
    recorder = Recorder(module.model, drop)
    loader = DataLoader(TensorDataset(*batch(4)), batch_size=4)
    lightning_trainer(enable_checkpointing=False, limit_val_batches=0).fit(module, loader)
    assert [forward.tokens for forward in recorder.forwards] == [ALL_TOKENS] * 2


@pytest.mark.parametrize("order", ["attach, prepare", "prepare, attach"])
@both_stages
def test_accelerate(stage, order):
    accelerator, drop = Accelerator(cpu=True), RandomPatchDropout(0.5)
    model = make_timm()
    if order == "attach, prepare":
        gaussmask.attach(model, drop, stage=stage)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if order == "prepare, attach":
        gaussmask.attach(model, drop, stage=stage)
    recorder = Recorder(accelerator.unwrap_model(model), drop)
    images, labels = batch()
    for _ in range(2):
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
    assert recorder.tokens_of(training=True) == [KEPT_TOKENS] * 2
    assert gradients(accelerator.unwrap_model(model)) == {name for name, _ in make_timm().named_parameters()}
    assert gaussmask.attached(model) is drop
    check_against_no_trainer(recorder.forwards, make_timm)
    make_timm().load_state_dict(accelerator.get_state_dict(model))


def test_accelerates_seed_makes_the_processes_draw_apart(monkeypatch):
    model, drop, kept = make_timm(), RandomPatchDropout(0.5), []
    gaussmask.attach(model, drop)
    for process in (0, 0, 1):
        monkeypatch.setattr(PartialState(), "process_index", process)
        set_seed(0, device_specific=True)
        model(**x_images(2))
        kept.append(drop.keep_indices)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


# Layers that are exchanged


LORA = {
    "timm": {"blocks": ["qkv"], "projection": ["patch_embed.proj"], "head": ["head"], "embeddings": ["patch_embed"]},
    "transformers": {
        "blocks": ["q_proj", "query"], "projection": ["patch_embeddings.projection"], "head": ["classifier"],
        "embeddings": ["vit.embeddings"],
    },
}  # fmt: skip


def with_adapters(library, drop, stage, order, targets, **settings):
    """A model with a drop and LoRA that changes what is computed from the start."""
    torch.manual_seed(0)
    model = MODELS[library]()
    config = LoraConfig(r=2, target_modules=LORA[library][targets], init_lora_weights=False, **settings)
    if order == "attach, adapt":
        gaussmask.attach(model, drop, stage=stage)
    model = get_peft_model(model, config)
    if order == "adapt, attach":
        gaussmask.attach(model, drop, stage=stage)
    return model


def loss_of(model, seed=3):
    images, labels = batch()
    torch.manual_seed(seed)
    return F.cross_entropy(logits(model(images)), labels)


either_order = pytest.mark.parametrize("order", ["attach, adapt", "adapt, attach"])


def check_masked_training(model, drop, trained):
    """The adapted model trains on kept patches: as if the unadapted one were given them, with the adapters merged."""
    recorder = Recorder(model, drop)
    loss = loss_of(model)
    loss.backward()
    assert recorder.tokens_of(training=True) == [KEPT_TOKENS]
    assert drop.keep_indices.shape == (4, 18)
    assert gradients(model) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(part in name for part in trained) for name in gradients(model))
    return loss


@either_order
@both_stages
@both_libraries
def test_lora_on_the_blocks(library, stage, order):
    drop = RandomPatchDropout(0.5)
    model = with_adapters(library, drop, stage, order, "blocks", modules_to_save=LORA[library]["head"])
    loss = check_masked_training(model, drop, ["lora_", "modules_to_save"])
    other = with_adapters(
        library, RandomPatchDropout(0.5), "tokens", order, "blocks", modules_to_save=LORA[library]["head"]
    )
    torch.testing.assert_close(loss, loss_of(other))
    merged = model.merge_and_unload()
    assert gaussmask.attached(merged) is drop
    torch.testing.assert_close(loss_of(merged), loss)
    merged.eval()
    assert loss_of(merged) != loss
    assert drop.keep_indices is None


@either_order
@both_libraries
def test_lora_on_the_projection(library, order):
    drop = RandomPatchDropout(0.5)
    model = with_adapters(library, drop, "tokens", order, "projection")
    loss = check_masked_training(model, drop, ["lora_"])
    merged = model.merge_and_unload()
    if (library, order) == ("transformers", "adapt, attach"):
        with pytest.raises(UnsupportedModelError, match="attach again"):
            loss_of(merged)
        gaussmask.attach(merged, drop)
    torch.testing.assert_close(loss_of(merged), loss)
    refused = pytest.raises(UnsupportedModelError, match=r"projection is a peft.*stage='tokens' can be used")
    if order == "adapt, attach":
        with refused:
            with_adapters(library, RandomPatchDropout(0.5), "pixels", order, "projection")
    else:
        model = with_adapters(library, RandomPatchDropout(0.5), "pixels", order, "projection")
        with refused:
            loss_of(model)


@both_stages
@both_libraries
def test_embeddings_that_peft_trains_whole(library, stage):
    saved, drop = LORA[library]["embeddings"], RandomPatchDropout(0.5)
    model = with_adapters(library, RandomPatchDropout(0.5), stage, "attach, adapt", "blocks", modules_to_save=saved)
    with pytest.raises(UnsupportedModelError, match="attach again"):
        loss_of(model)
    if (library, stage) == ("timm", "pixels"):
        with pytest.raises(UnsupportedModelError, match=r"ModulesToSaveWrapper.*stage='tokens' can be used"):
            loss_of(gaussmask.attach(model, drop, stage=stage))
        return
    model = with_adapters(library, drop, stage, "adapt, attach", "blocks", modules_to_save=saved)
    loss = check_masked_training(model, drop, ["lora_", "modules_to_save"])
    other = with_adapters(library, RandomPatchDropout(0.5), "tokens", "adapt, attach", "blocks", modules_to_save=saved)
    torch.testing.assert_close(loss, loss_of(other))
    merged = model.merge_and_unload()
    if library == "timm":
        with pytest.raises(UnsupportedModelError, match="attach again"):
            loss_of(merged)
        gaussmask.attach(merged, drop)
    torch.testing.assert_close(loss_of(merged), loss)


def test_peft_wraps_embeddings_within_embeddings():
    """As the page says, and no matter of a drop."""
    config = LoraConfig(target_modules=LORA["transformers"]["blocks"], modules_to_save=["embeddings"])
    model = get_peft_model(make_vit(), config)
    loss_of(model).backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - gradients(model)
    assert any("patch_embeddings.modules_to_save" in name for name in untrained)


TORCHAO = ["int8 weights", "int8 training", "quantisation-aware"]


def quantise(model, how, **filter_fn):
    torchao = pytest.importorskip("torchao", reason="in the dependency group integrations")
    training = pytest.importorskip("torchao.prototype.quantized_training")
    qat = pytest.importorskip("torchao.quantization.qat")
    config = {
        "int8 weights": torchao.quantization.Int8WeightOnlyConfig,
        "int8 training": training.int8_weight_only_quantized_training,
        "quantisation-aware": lambda: qat.QATConfig(
            weight_config=qat.IntxFakeQuantizeConfig(torch.int8, group_size=16), step="prepare"
        ),
    }[how]()
    torchao.quantization.quantize_(model, config, **filter_fn)
    return model


@pytest.mark.parametrize("order", ["attach, quantise", "quantise, attach"])
@pytest.mark.parametrize("how", TORCHAO)
@both_stages
@both_libraries
def test_torchao(library, stage, how, order):
    torch.manual_seed(0)
    model, drop = MODELS[library](), RandomPatchDropout(0.5)
    plain = copy.deepcopy(model)
    if order == "attach, quantise":
        quantise(gaussmask.attach(model, drop, stage=stage), how)
    else:
        gaussmask.attach(quantise(model, how), drop, stage=stage)
    loss = check_masked_training(model, drop, [""])
    quantised = quantise(copy.deepcopy(plain), how)
    other = gaussmask.attach(quantised, RandomPatchDropout(0.5), stage="tokens")
    torch.testing.assert_close(loss, loss_of(other))
    assert loss != loss_of(gaussmask.attach(plain, RandomPatchDropout(0.5))), "nothing was quantised"


@pytest.mark.parametrize("how", TORCHAO)
def test_torchao_on_a_linear_projection(how):
    torch.manual_seed(0)
    model, drop = make_naflex(), RandomPatchDropout(0.5)
    pixels, tokens = copy.deepcopy(model), quantise(gaussmask.attach(model, drop), how)
    loss_of(tokens).backward()
    assert drop.keep_indices.shape == (4, 18)
    assert gradients(tokens) == {name for name, parameter in tokens.named_parameters() if parameter.requires_grad}

    def all_but_the_projection(module, name):
        return type(module) is torch.nn.Linear and name != "embeds.proj"

    gaussmask.attach(pixels, RandomPatchDropout(0.5), stage="pixels")
    partly = quantise(copy.deepcopy(pixels), how, filter_fn=all_but_the_projection)
    same = gaussmask.attach(copy.deepcopy(partly), RandomPatchDropout(0.5), stage="tokens")
    torch.testing.assert_close(loss_of(partly), loss_of(same))
    with pytest.raises(UnsupportedModelError, match=r"its projection is .*stage='tokens' can be used"):
        loss_of(quantise(pixels, how))


# Wrappers that are no trainers


@both_stages
def test_lightly(stage):
    """Its parts are called past the drop, which raises; its own indices mask as the drop would."""
    modules = pytest.importorskip("lightly.models.modules", reason="in the dependency group integrations")
    images, _ = batch()
    encoder = modules.MaskedVisionTransformerTIMM(make_timm())
    drop = GaussianPatchDropout(0.75, sigma=0.2)
    gaussmask.attach(encoder, drop, stage=stage)
    with pytest.raises(UnsupportedModelError, match="its parts are called one by one"):
        encoder(images)
    torch.manual_seed(1)
    expected = encoder.vit.forward_features(images)
    gaussmask.detach(encoder)

    torch.manual_seed(1)
    keep = sample_keep_indices(len(images), encoder.vit.patch_embed.grid_size, 0.75, sigma=0.2)
    assert torch.equal(keep, drop.keep_indices)
    always = torch.zeros(len(images), 1, dtype=torch.int64)
    tokens = encoder.encode(images, idx_keep=torch.cat([always, 1 + keep], dim=1))
    assert tokens.shape == (4, 1 + 9, 32)
    torch.testing.assert_close(tokens, expected)


def test_deepspeed(monkeypatch):
    pytest.importorskip("deepspeed", reason="in the dependency group integrations")
    start_process(monkeypatch, train_with_deepspeed)


def train_with_deepspeed(rank):
    """Three steps at every stage of both are those of a loop without it."""
    import deepspeed

    torch.set_num_threads(1)
    for stage, zero in itertools.product(("tokens", "pixels"), range(4)):
        torch.manual_seed(0)
        model, drop = make_timm(), RandomPatchDropout(0.5)
        alone = gaussmask.attach(copy.deepcopy(model), RandomPatchDropout(0.5))
        gaussmask.attach(model, drop, stage=stage)
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            config={
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": zero},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,  # which is 1.0 otherwise
            },
        )
        if (stage, zero) == ("pixels", 3):
            with pytest.raises(UnsupportedModelError, match=r"projection carries hooks .*stage='tokens' can be used"):
                loss_of(engine)
            continue
        recorder = Recorder(model, drop)
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        for seed in range(3):
            loss, expected = loss_of(engine, seed), loss_of(alone, seed)
            torch.testing.assert_close(loss, expected)
            engine.backward(loss)
            engine.step()
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
        assert recorder.tokens_of(training=True) == [KEPT_TOKENS] * 3
        assert gaussmask.attached(engine) is drop
    torch.distributed.destroy_process_group()


# Copies


@pytest.mark.parametrize("make_average", [partial(ModelEmaV3, decay=0.5), AveragedModel])
@both_stages
def test_running_means(make_average, stage):
    """Whether the mean masks goes by the mode of its copy; a drop that is taken off masks in neither."""
    student, drop = make_timm(), RandomPatchDropout(0.5)
    gaussmask.attach(student, drop, stage=stage)
    average = make_average(student)
    own = gaussmask.attached(average)
    assert own is not drop
    images, labels = batch()
    F.cross_entropy(student(images), labels).backward()
    kept = drop.keep_indices
    average(images)
    masks = isinstance(average, AveragedModel)  # the other is in eval mode
    assert (own.keep_indices is not None) == masks
    assert drop.keep_indices is kept

    gaussmask.detach(average)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.sub_(parameter.grad)
    update = average.update if isinstance(average, ModelEmaV3) else average.update_parameters
    before = copy.deepcopy(average.module.state_dict())
    update(student)
    assert any(not torch.equal(before[name], value) for name, value in average.module.state_dict().items())
    plain = make_timm()
    plain.load_state_dict(average.module.state_dict())
    for mode in (True, False):
        torch.testing.assert_close(average.train(mode)(images), plain(images))
    student(images)
    assert drop.keep_indices.shape == (4, 18)


@both_stages
def test_teacher(stage):
    """A teacher in training mode sees whole images, whatever its student sees, and gets no gradient."""
    student, drop = make_timm(), RandomPatchDropout(0.5)
    gaussmask.attach(student, drop, stage=stage)
    teacher = gaussmask.detach(copy.deepcopy(student)).requires_grad_(False)
    watched = {model: Recorder(model, drop) for model in (student, teacher)}
    images, _ = batch()
    F.mse_loss(student(images), teacher(images)).backward()
    assert watched[student].tokens_of(training=True) == [KEPT_TOKENS]
    assert watched[teacher].tokens_of(training=True) == [ALL_TOKENS]
    check_against_no_trainer(watched[student].forwards, make_timm)
    assert gradients(student) == {name for name, _ in student.named_parameters()}
    assert not gradients(teacher)


# torch.func


class Told(gaussmask.PatchDropout):
    """Keeps the patches that it was told to."""

    def scores(self, coords, generator=None):
        return torch.zeros(coords.shape[:2]).scatter_(1, self.told, 1.0)


@both_stages
@both_libraries
def test_functional_call(library, stage):
    model, drop = MODELS[library](), RandomPatchDropout(0.5)
    gaussmask.attach(model, drop, stage=stage)
    others = {name: 2 * parameter for name, parameter in model.named_parameters()}
    images, labels = batch()
    plain = gaussmask.attach(copy.deepcopy(model), RandomPatchDropout(0.5))

    def loss(parameters):
        torch.manual_seed(3)
        return F.cross_entropy(logits(torch.func.functional_call(model, parameters, (images,))), labels)

    gradient, value = torch.func.grad_and_value(loss)(others)
    assert drop.keep_indices.shape == (4, 18)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    expected = loss_of(plain)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, {name: parameter.grad for name, parameter in plain.named_parameters()})


@both_stages
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_per_sample_gradients(randomness, stage):
    """They are those of a loop over the samples that keeps the same patches."""
    torch.manual_seed(0)
    model, drop = make_timm(), RandomPatchDropout(0.5)
    gaussmask.attach(model, drop, stage=stage)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    images, labels = batch()

    def loss(parameters, image, label):
        output = torch.func.functional_call(model, parameters, (image.unsqueeze(0),))
        return F.cross_entropy(output, label.unsqueeze(0)), gaussmask.attached(model).keep_indices

    gradient = torch.func.grad(loss, has_aux=True)
    per_sample, kept = torch.func.vmap(gradient, in_dims=(None, 0, 0), randomness=randomness)(
        parameters, images, labels
    )
    assert kept.shape == (4, 1, 18)
    assert bool((kept == kept[:1]).all()) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(gradient, in_dims=(None, 0, 0))(parameters, images, labels)

    told = Told(0.5)
    gaussmask.attach(model, told)
    for i, told.told in enumerate(kept):
        expected, _ = gradient(parameters, images[i], labels[i])
        torch.testing.assert_close({name: value[i] for name, value in per_sample.items()}, expected)
