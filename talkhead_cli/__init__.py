"""talkhead: from a person's video to a talking avatar, from any speech to a film of them."""

__version__ = "0.1.0"
