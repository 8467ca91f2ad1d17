"""S3D-NeRF: a talking head from one picture, without training on the person."""

from talkhead_cli.avatars.s3d.field import S3DField
from talkhead_cli.avatars.s3d.method import DEFORMATIONS, S3D
from talkhead_cli.avatars.s3d.speaker import S3DSpeaker

__all__ = ["DEFORMATIONS", "S3D", "S3DField", "S3DSpeaker"]
