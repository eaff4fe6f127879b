"""What a model gets that cannot be masked."""


class UnsupportedModelError(TypeError):
    """A model that cannot be masked; the message names its class, the reason and, where there is one, the way out."""


def cannot_drop_pixels(host_name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{host_name} cannot drop pixels: {reason}. stage='tokens' can be used")
