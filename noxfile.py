"""The versions that gaussmask is tested with, and its package in empty environments.

    make versions    # all of it: nox
    nox -s oldest    # one session; what follows -- goes to pytest
    nox -s between   # every week: versions in the middle
    nox -s integrations upstream    # every night: trainers, and the tests of timm and transformers

Interpreters are looked for on the PATH, and a session whose interpreter is missing is skipped.
"""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
EXTRAS = tuple(PROJECT["project"]["optional-dependencies"])
CORE_TESTS = ("tests/test_dropout.py", "tests/test_package.py", "tests/test_probability.py")
KOSMOS = (
    "Kosmos2Model", "Kosmos2ForConditionalGeneration", "Kosmos2_5Model", "Kosmos2_5ForConditionalGeneration",
    "Kosmos2VisionTransformer",
)  # fmt: skip
# What the oldest libraries cannot do themselves, or cannot show: no lower bound is worth it.
BEYOND_THE_OLDEST = (
    # The names, the page and the README are those of the newest versions.
    "test_every_name.py",
    "test_hosts_page.py",
    "test_readme.py::test_the_python_runs_and_prints_what_is_shown_below_it[README.md]",
    # torch 2.6 finds no graph through a decorator of transformers 5.0.
    *(
        f"{test}[transformers-{name}-tokens]"
        for test in (
            "test_attach.py::test_compiles_without_a_graph_break",
            "test_asking.py::test_rules_that_ask_compile_whole",
        )
        for name in ("DINOv3ViTModel", "MLCDVisionModel", "YolosModel", "VivitModel")
    ),
    # torch 2.6 breaks the graph at the checks of stage "pixels", which look at hooks.
    *(
        f"test_attach.py::test_compiles_without_a_graph_break[{name}-pixels]"
        for name in ("timm-vit", "timm-naflex-learned", "transformers-CLIPModel")
    ),
    "test_benchmarks.py::test_a_compiled_step_trains",
    "test_pixels.py::test_auto_takes_tokens_in_a_graph_that_could_not_look_for_obstacles[False]",
    *(
        f"test_asking.py::test_rules_that_ask_compile_whole[{name}-pixels]"
        for name in ("timm-vit", "timm-naflex-learned", "transformers-CLIPModel")
    ),
    # transformers 5.0 builds models on the meta device, where timm 1.0.20 cannot be built.
    "test_attach.py::test_save_pretrained_round_trip[transformers-TimmWrapperModel-tokens]",
    "test_attach.py::test_save_pretrained_round_trip[transformers-TimmWrapperModel-pixels]",
    # transformers 5.0 shifts the labels of GIT twice, makes the cross-attention of KOSMOS-2 causal, and builds the text
    # models of both KOSMOS with their default sizes and dropouts.
    "test_whole_models.py::test_git_counts_the_kept_tokens",
    *(f"test_whole_models.py::test_nothing_behind_the_tower_believes_in_all_patches[{name}]" for name in KOSMOS),
    "test_whole_models.py::test_whole_models_train_on_fewer_patches[Kosmos2VisionTransformer]",
    # torch 2.6 exports with strict=True only what sets no attribute in its forward.
    "test_export.py::test_nothing_of_gaussmask_is_in_an_exported_graph[timm-vit-stages0-True]",
    # torch 2.6 has no FSDP2 on the CPU.
    "test_train_clip.py::test_two_processes_compute_what_one_computes",
    "test_train_clip.py::test_two_processes_train_shard_and_resume",
    *(
        f"test_distributed.py::test_a_projection_sharded_by_itself_drops_no_pixels[{path}]"
        for path in ("patch_embed", "patch_embed.proj")
    ),
    "test_distributed.py::test_auto_takes_tokens_where_the_projection_is_sharded_by_itself",
    # torch 2.6 puts back no moments where a parameter has had no gradient yet.
    "test_train_clip.py::TestCheckpoints::test_a_full_disk_says_so_and_leaves_the_last_good_one",
    # timm 1.0.20 reads no safetensors from a folder.
    "test_train_clip.py::test_models_open_without_gaussmask",
    # timm 1.0.20 builds no models on the meta device, where the benchmarks count their tokens.
    "test_benchmarks.py::test_a_run_leaves_the_figures_the_tables_and_the_plots",
    "test_benchmarks.py::test_every_contender_is_in_every_group",
    "test_benchmarks.py::test_what_fails_and_what_the_time_does_not_suffice_for_is_in_the_tables",
    "test_benchmarks.py::test_texts_go_between_the_markers_of_a_page_and_nowhere_else",
    "test_benchmarks.py::test_the_ceiling_is_that_of_the_arithmetic",
    # transformers 5.0 writes a dtype into a config when it is saved.
    "test_hf_clip.py::TestRun::test_training_goes_on_from_what_was_saved",
    # timm 1.0.20 and transformers 5.0 know no is_causal, and Eva no mask either.
    "test_never_silently_wrong.py::test_causal_attention_needs_the_patches_in_their_order",
    "test_never_silently_wrong.py::test_causal_attention_that_goes_round_the_tower_needs_ordered_tokens_too",
    *(
        f"test_never_silently_wrong.py::test_a_mask_over_all_tokens_does_not_follow[timm-{name}]"
        for name in ("eva02", "eva-dinov3")
    ),
    # timm 1.0.20 makes this rotary table in float32 alone, and its NaFlexVit pads no images.
    "test_pixels.py::test_auto_is_equal_to_the_tokens_and_takes_pixels_where_it_can[timm-eva-rope-mixed]",
    "test_pixels.py::test_same_draws_outputs_and_gradients_as_the_tokens[timm-eva-rope-mixed-half]",
    "test_pixels.py::test_same_draws_outputs_and_gradients_as_the_tokens[timm-eva-rope-mixed-most]",
    *(
        f"test_pixels.py::test_shapes_and_layouts_of_images[{memory}-naflex, padded]"
        for memory in ("as made", "channels last", "strided")
    ),
)
# The library's own tests, whose ground (hooks, compilers, modules of the hosts) differs from one torch to the next.
OF_THE_LIBRARY = (
    "asking", "attach", "describe", "dropout", "export", "functional", "grids", "hardening", "kept",
    "never_silently_wrong", "oracle", "pixels", "rules", "whole_models",
)  # fmt: skip
# In transformers 5.17 RADIO takes no packed images, and the cross-attention of KOSMOS-2 is causal.
BEYOND_THE_MIDDLE = (
    "test_never_silently_wrong.py::test_radio_packs_images_only_without_a_drop",
    *(
        f"test_whole_models.py::test_nothing_behind_the_tower_believes_in_all_patches[{name}]"
        for name in ("Kosmos2Model", "Kosmos2ForConditionalGeneration")
    ),
)
# Old libraries beside newer ones of others: what these deprecate is no news.
OLD = (
    *("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"),
    *("-W", "ignore:Skipping serialization of:UserWarning"),  # torch 2.6, of its own settings when it compiles
    *("-W", "ignore:mtime may not be reliable:UserWarning"),  # transformers 5.0, when it rotates checkpoints
)

nox.needs_version = ">=2025.5"
nox.options.envdir = "build/nox"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["oldest", "newest", "core", "extras"]


def starts(version: str) -> bool:
    found = shutil.which(f"python{version}")
    return found is not None and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0


OLDEST, NEWEST = PYTHONS[0], next(filter(starts, reversed(PYTHONS)), PYTHONS[-1])


def wheel() -> str:
    (path,) = Path("dist").glob("*.whl")
    return str(path)


def leave(session: nox.Session) -> None:
    """Remove an environment with its gigabytes of torch."""
    shutil.rmtree(session.virtualenv.location)


def without(tests: tuple[str, ...]) -> list[str]:
    return [f"--{'deselect' if '::' in test else 'ignore'}=tests/{test}" for test in tests]


def run_tests(session: nox.Session, *options: str) -> None:
    session.run("pytest", "-n", "auto", "--dist", "loadgroup", *options, *session.posargs)


@nox.session(python=OLDEST)
def oldest(session: nox.Session) -> None:
    """The oldest Python, and the oldest libraries that the lower bounds admit."""
    session.install("-e", ".[all]", "--group", "test", "-c", ".ci/oldest.txt")
    run_tests(session, *OLD, *without(BEYOND_THE_OLDEST))


@nox.session(python=NEWEST)
def between(session: nox.Session) -> None:
    """A torch from the middle, as images of GPU machines carry it: what neither the oldest nor the newest one shows."""
    session.install("-e", ".[all]", "--group", "test", "-c", ".ci/between.txt")
    tests = [f"tests/test_{name}.py" for name in OF_THE_LIBRARY]
    run_tests(session, "-W", "default", *without(BEYOND_THE_MIDDLE), *tests)


@nox.session(python=NEWEST)
def newest(session: nox.Session) -> None:
    """The newest Python here, and the newest libraries."""
    session.install("--upgrade", "-e", ".[all]", "--group", "test")
    run_tests(session)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """The wheel and the sdist, into dist/, and what is in them; with the tools of the environment that nox is in."""
    shutil.rmtree("dist", ignore_errors=True)
    session.run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist")
    session.run(sys.executable, "-m", "pytest", "tests/test_package.py", env={"DIST": str(Path("dist").absolute())})


@nox.session(python=NEWEST, requires=["build"])
def core(session: nox.Session) -> None:
    """The wheel with torch and einops only: what comes with it, and the tests that need no more."""
    session.install(wheel())
    session.run("python", "-c", "import gaussmask, torch; gaussmask.GaussianPatchDropout(0.5)(torch.randn(2, 16, 8))")
    session.install("hypothesis", "numpy", "pytest", "scipy")
    session.run("pytest", *CORE_TESTS)
    leave(session)


@nox.session(python=NEWEST, requires=["build"])
@nox.parametrize("extra", EXTRAS)
def extras(session: nox.Session, extra: str) -> None:
    """The wheel with one extra: import, and one use of it."""
    session.install(f"{wheel()}[{extra}]")
    session.run("python", ".ci/extras.py", extra)
    leave(session)


@nox.session(python=NEWEST)
def integrations(session: nox.Session) -> None:
    """All trainers of docs/integrations.md, also those that are built from source or bound to one version of torch."""
    session.install("--upgrade", "-e", ".[all]", "--group", "test", "--group", "integrations")
    session.run("python", "-c", "import deepspeed, lightly, torchao")  # the tests of an absent one would be skipped
    session.run("pytest", "tests/test_integrations.py", *session.posargs)


@nox.session(python=NEWEST)
def upstream(session: nox.Session) -> None:
    """timm's and transformers' own tests, from their sdists, on models that carry a drop: see tests/upstream."""
    session.install("--upgrade", "-e", ".[all]", "parameterized", "pip", "pytest>=8.2")
    for library, tests in (
        ("timm", "build/upstream/timm/tests/test_models.py"),
        ("transformers", "tests/upstream/test_transformers.py"),
    ):
        folder = unpack_tests(session, library)
        for stage in ("tokens", "pixels"):
            session.run(
                "pytest", "-c", "tests/upstream/pytest.ini", "--library", library, "--stage", stage, tests,
                *session.posargs,
                env={"PYTHONPATH": f"tests/upstream:{folder}", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip


def unpack_tests(session: nox.Session, library: str) -> Path:
    """The folder with the tests of the version that is installed; its modules stay away, or they would be imported."""
    folder = Path("build/upstream") / library
    shutil.rmtree(folder, ignore_errors=True)
    ask = f"import importlib.metadata; print(importlib.metadata.version('{library}'))"
    version = str(session.run("python", "-c", ask, silent=True)).strip()
    session.run(
        *("python", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", library, "--dest", str(folder)),
        f"{library}=={version}",
    )
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        root = f"{library}-{version}/"
        for member in sdist.getmembers():
            if member.isfile() and member.name.startswith(f"{root}tests/"):
                member.name = member.name.removeprefix(root)
                sdist.extract(member, folder)
    return folder
