"""talkhead: train a talking avatar on a person's video and render it speaking any audio."""

__version__ = "0.1.0"
