"""Storage on disk: workspaces of people, trained runs, third-party weights."""

from talkhead_cli.store.checkpoint import Run, finished_runs, list_runs
from talkhead_cli.store.workspace import (
    FILM_PX,
    Workspace,
    check_id,
    home_folder,
    list_ids,
    priors_folder,
)

__all__ = [
    "FILM_PX",
    "Run",
    "Workspace",
    "check_id",
    "finished_runs",
    "home_folder",
    "list_ids",
    "list_runs",
    "priors_folder",
]
