"""Short captions in training: which words stay, what the text tower makes of them, and who sees whole ones."""

import json
import math
import random
import typing
from collections import Counter

import clip_captions
import clip_options
import clip_plan
import clip_step
import clip_towers
import open_clip
import pytest
import torch
import train_clip
from clip_runs import TINY, metrics, options, write_shards

import gaussmask

LONG = {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 16, "heads": 2, "layers": 2}}


def architecture(**text):
    return json.loads(json.dumps({**LONG, "text_cfg": {**LONG["text_cfg"], **text}}))


def by_frequency(counts, num_tokens, threshold=1e-6):
    return clip_captions.make_shortener(architecture(), num_tokens, "frequency", counts=counts, threshold=threshold)


class TestByFrequency:
    def test_two_words_stay_as_often_as_geometry_says(self):
        """u - a > v - b for u, v uniform in [0, 1): with d = a - b in [0, 1], a triangle of the area (1 - d)^2 / 2."""
        counts = {"often": 900_000, "seldom": 100_000}
        share = {word: count / 1_000_000 for word, count in counts.items()}
        threshold = 0.05
        a, b = (1 - math.sqrt(threshold / share[word]) for word in ("often", "seldom"))
        shorten = by_frequency(counts, 3, threshold).shorten
        torch.manual_seed(0)
        draws = 20_000
        found = Counter(shorten("often seldom") for _ in range(draws))
        expected = (1 - (a - b)) ** 2 / 2
        assert found["often"] / draws == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / draws))
        assert found["often"] + found["seldom"] == draws

    def test_a_word_that_was_hardly_met_goes_before_one_of_a_known_share(self):
        """Its handicap is 1: it stays only with u - 1 > v - b, the area b^2 / 2 with b the other's handicap."""
        counts = {"known": 1_000_000, "rare": 4}
        b = 1 - math.sqrt(0.25)
        torch.manual_seed(0)
        draws = 20_000
        shorten = by_frequency(counts, 3, 0.25).shorten
        stays = sum(shorten("known rare") == "rare" for _ in range(draws)) / draws
        assert stays == pytest.approx(b**2 / 2, abs=4 * math.sqrt(b**2 / 2 / draws))
        assert all(shorten("known unheard") in ("known", "unheard") for _ in range(100))

    def test_what_stays_is_in_order_and_fits(self):
        words = [f"word{'abcdefghijklmnop'[number]}" for number in range(16)]
        shorten = by_frequency(dict.fromkeys(words, 10), 8)
        for seed in range(50):
            torch.manual_seed(seed)
            kept = shorten.shorten(" ".join(words)).split()
            assert len(kept) == 6
            assert sorted(kept, key=words.index) == kept
        assert shorten.shorten("Only two, Words") == "Only two, Words"  # has no more than six
        tokens = shorten([" ".join(words), "two words"])
        assert tokens.shape == (2, 8)
        assert (tokens == 49407).any(dim=1).all()  # every caption has its end

    def test_words_are_counted_as_a_plain_loop_counts_them(self, tmp_path):
        shards = [str(shard) for shard in write_shards(tmp_path, 12, 5)]
        for every in (False, True):
            captions = [[f"a {['red', 'green', 'blue', 'white'][n % 4]} picture {n}", f"number {n}"] for n in range(12)]
            plain = Counter()
            for texts in captions:
                for text in texts if every else texts[:1]:
                    plain.update([*text.rpartition(" ")[0].split(), *text.rpartition(" ")[2]])  # digits one by one
            assert clip_captions.count_words_in_shards(shards, all_captions=every, workers=0) == plain
            assert clip_captions.count_words_in_shards(shards, all_captions=every, workers=2) == plain


@pytest.mark.parametrize("reduction", ["simple", "random", "shuffle"])
def test_reductions_are_those_of_open_clip(reduction):
    captions = ["one two three four five six seven eight nine ten", "two words"]
    ours = clip_captions.make_shortener(architecture(), 6, reduction, counts={}, threshold=1)
    theirs = open_clip.SimpleTokenizer(context_length=6, reduction_mask=reduction)
    found = []
    for tokenize in (ours, theirs):
        torch.manual_seed(0)
        random.seed(0)
        found.append(tokenize(captions))
    assert torch.equal(*found)
    assert found[0].shape == (2, 6)


class TestTextTower:
    """A caption of L tokens, through a tower of a longer context, is one through a tower of L positions."""

    @pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
    @pytest.mark.parametrize("causal", [True, False])
    def test_short_captions_take_the_first_positions(self, custom, causal):
        torch.manual_seed(0)
        config = {**architecture(no_causal_mask=not causal), "custom_text": custom}
        long = clip_towers.create_model(config)
        short = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(
            **architecture(no_causal_mask=not causal, context_length=6)
        )
        weights = {
            name: tensor[:6] if name.endswith("positional_embedding") and "visual" not in name else tensor
            for name, tensor in long.state_dict().items()
        }
        short.load_state_dict(weights)
        tokens = torch.randint(1, 49000, (3, 6))
        tokens[:, -1] = 49407
        torch.testing.assert_close(long.encode_text(tokens), short.encode_text(tokens), rtol=0, atol=0)
        whole = torch.cat([tokens, torch.zeros(3, 10, dtype=torch.long)], dim=1)
        if causal:  # what comes after the end is not seen
            torch.testing.assert_close(long.encode_text(whole), long.encode_text(tokens), rtol=1e-5, atol=1e-6)

    def test_a_whole_caption_gives_what_open_clip_gives(self):
        torch.manual_seed(0)
        ours = clip_towers.create_model(architecture())
        theirs = open_clip.CLIP(**architecture())
        theirs.load_state_dict(ours.state_dict())
        tokens = torch.randint(1, 49000, (3, 16))
        torch.testing.assert_close(ours.encode_text(tokens, True), theirs.encode_text(tokens, True), rtol=0, atol=0)

    @pytest.mark.parametrize("text", [{"pool_type": "last"}, {"embed_cls": True}])
    def test_towers_that_read_the_last_position_are_refused(self, text):
        with pytest.raises(clip_captions.UserError, match="take context_length 6 instead"):
            clip_captions.check_reduction(architecture(**text), 6)

    def test_other_tokenizers_have_two_reductions(self):
        with pytest.raises(clip_captions.UserError, match="needs CLIP's own tokenizer, and this model has bert"):
            clip_captions.check_reduction(architecture(hf_tokenizer_name="bert"), 6, "random")


def test_training_sees_short_captions_and_everything_else_whole_ones(tmp_path, monkeypatch):
    """Six tokens in the masked training; sixteen in the tuning, and in every evaluation."""
    data = write_shards(tmp_path / "data", 8, 8)[0]
    (tmp_path / "long.json").write_text(json.dumps(architecture()))
    lengths = []
    encode = clip_towers.CLIP.encode_text

    def spy(self, text, normalize=False):
        lengths.append((self.training, text.shape[1]))
        return encode(self, text, normalize)

    monkeypatch.setattr(clip_towers.CLIP, "encode_text", spy)
    train_clip.main(
        options(
            train_data=str(data), model=str(tmp_path / "long.json"), output=tmp_path / "run", device="cpu",
            precision="fp32", epochs=1, tuning_epochs=1, batch_size=4, workers=0, log_every=1, retrieval=str(data),
            caption_tokens=6, caption_reduction="frequency", rule="cluster", rule_options={"anchors": 2, "noise": 0.1},
        )
    )  # fmt: skip
    assert [length for training, length in lengths if training] == [6, 6, 16, 16]
    assert {length for training, length in lengths if not training} == {16}
    counts = json.loads((tmp_path / "run" / "word_counts.json").read_text())
    assert counts["picture"] == 8
    assert all(0 <= record["waited"] <= 1 for record in metrics(tmp_path / "run") if "loss" in record)


def test_the_ratio_moves_from_one_end_to_the_other(tmp_path):
    data = write_shards(tmp_path / "data", 20, 20)[0]
    (tmp_path / "long.json").write_text(json.dumps(architecture()))
    train_clip.main(
        options(
            train_data=str(data), model=str(tmp_path / "long.json"), output=tmp_path / "run", device="cpu",
            precision="fp32", epochs=1, tuning_epochs=0, batch_size=4, workers=0, log_every=1, rule="random",
            mask_ratio=0.75, mask_ratio_end=0.25,
        )
    )  # fmt: skip
    kept = [record["patches"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert kept == ["4/16", "6/16", "8/16", "10/16", "12/16"]


class TestOptions:
    def test_what_a_run_writes_is_what_a_run_reads(self, tmp_path):
        given = options(
            train_data="a.tar", rule="cluster", rule_options={"anchors": 2, "noise": 0.5}, crop_scale=(0.5, 1),
            max_norm=1.5, compile=True, init_from=tmp_path, caption_tokens=8, zero_shot="-b.tar",
        )  # fmt: skip
        file = tmp_path / "run.json"
        file.write_text(json.dumps(clip_options.as_options(given)))
        read = options(config=file)
        again = clip_options.as_options(read)
        assert again == {**clip_options.as_options(given), "config": str(file)}
        assert isinstance(read.mask.rule_options["anchors"], int)

    def test_the_command_line_takes_precedence(self, tmp_path):
        file = tmp_path / "run.json"
        file.write_text(
            json.dumps({"train_data": "a.tar", "mask_ratio": 0.9, "crop_scale": [0.1, 0.2], "compile": True})
        )
        read = options(config=file, mask_ratio=0.6, crop_scale=(0.3, 0.4), compile=False)
        assert (read.mask.mask_ratio, read.data.crop_scale, read.compute.compile) == (0.6, (0.3, 0.4), False)
        assert read.data.train_data == "a.tar"

    @pytest.mark.parametrize(
        ("rule", "kind"),
        [
            ("random", gaussmask.RandomPatchDropout),
            ("gaussian", gaussmask.GaussianPatchDropout),
            ("grid", gaussmask.GridPatchDropout),
            ("block", gaussmask.BlockPatchDropout),
            ("cluster", gaussmask.ClusterPatchDropout),
        ],
    )
    def test_every_mask_has_its_rule(self, rule, kind):
        drop = clip_plan.choose_drop(options(train_data="a", rule=rule, mask_ratio=0.75, sampling="weighted").mask)
        assert type(drop) is kind
        assert drop.mask_ratio == 0.75
        if rule == "gaussian":
            assert drop.sampling == "weighted"
        assert set(clip_step.RULES) == set(typing.get_args(clip_options.Rule))
