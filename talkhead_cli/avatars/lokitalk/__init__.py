"""LokiTalk: region-specific deformation fields, and ID-aware knowledge transfer between people."""

from talkhead_cli.avatars.lokitalk.field import LokiField
from talkhead_cli.avatars.lokitalk.method import LokiTalk
from talkhead_cli.avatars.lokitalk.transfer import Transfer

__all__ = ["LokiField", "LokiTalk", "Transfer"]
