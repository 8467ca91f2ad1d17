"""Check whether a video is worth training on: a verdict and a remedy for each criterion.

Analyses pieces of ten seconds, spread over the video, shrunk to 1280 px; nothing is stored.  For
a long video it recommends the part with the most varied mouth shapes, sounds and views.
"""

from __future__ import annotations

from talkhead_cli.jobs.check.judge import check
from talkhead_cli.jobs.check.page import page, refuse_page
from talkhead_cli.jobs.check.report import Report

__all__ = ["Report", "check", "page", "refuse_page"]
