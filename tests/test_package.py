"""What a bare `import gaussmask` brings with it."""

import subprocess
import sys

import gaussmask


def test_importing_brings_in_no_host_library_and_no_matplotlib():
    code = "import sys, gaussmask; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"timm", "transformers", "open_clip", "matplotlib", "torchvision"} & set(loaded)


def test_every_public_name_is_there_and_documented():
    assert sorted(gaussmask.__all__) == gaussmask.__all__
    for name in gaussmask.__all__:
        assert getattr(gaussmask, name).__doc__
    for name in gaussmask.functional.__all__:
        assert getattr(gaussmask.functional, name).__doc__
