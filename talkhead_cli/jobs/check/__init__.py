"""Is a film worth hours of training?  A verdict beforehand, point by point, with the cure.

Looks at pieces of ten seconds, spread over the film, at their own size; nothing is kept.  Of a
long film it says which part shows most: mouths that move, sounds that differ, views.
"""

from __future__ import annotations

from talkhead_cli.jobs.check.judge import check
from talkhead_cli.jobs.check.page import page, refuse_page
from talkhead_cli.jobs.check.report import Report

__all__ = ["Report", "check", "page", "refuse_page"]
