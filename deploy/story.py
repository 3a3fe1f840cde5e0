"""A week in minutes: seven days of a retraining pipeline, told by the real commands on real pictures and a fast clock.

    python -m deploy.story [FOLDER]          (`make story`)

Everything is typed as a user would type it and runs as a process of its own; only the clock is moved (deploy/story_stage.py).
Each day's outcome is checked against what the story says, and the first that differs ends it: exit 1, with the day.
FOLDER, by default `story/`, is made anew each time: recipe, pipeline file, pictures, store, story.json and story.html.
"""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from deploy.story_days import MODEL, NAME, PIPELINE, STORE, Story, friday, monday, sunday, thursday, tuesday, wednesday, weekend
from deploy.story_page import write_page
from deploy.story_pictures import share_out
from deploy.story_stage import Clock, Desk, Receiver, Unexpected
from vggcore.errors import StoreError, VggrowError
from vggcore.whole_file import write_json

RECIPE, RECORD, PAGE, CLOCK = "cells.toml", "story.json", "story.html", "clock"

RECIPE_TEXT = f"""\
name = "{MODEL}"
seed = 7

[data]
root = "pictures"            # train/ val/ test/ gate/, each with defective/ and functional/
standardise = true

[net]                        # the paper's net A at an eighth of its width: seconds on one core
width = 0.125
crop = 64
dropout = 0.0
initialise = "he"

[train]
global_batch = 16
learning_rate = 3e-3
drops = 2
patience = 4
max_epochs = 18

[[stage]]
name = "A-72"
net = "A"
scale = 72

[evaluate]
protocol = "centre"

[register]
stage = "A-72"
floor = 0.6                  # of test, for the first champion alone; low, as it learns from a handful of cells
"""

PIPELINE_TEXT = f"""\
name = "{NAME}"
recipe = "{RECIPE}"

[watch]
folders = ["pictures"]

[timetable]
cron = "30 2 * * *"          # every night at 02:30
time_zone = "Europe/Berlin"

[gate]                       # alpha = 0.05 over planned_uses = 52, as they are when nothing is said
max_class_drop = 0.25        # the first model calls nearly all cells functional: of that recall some must be given up

[run]
threads = 1                  # the same sums on every machine, and quick enough
store = "{STORE}"

[notify]
url = "{{url}}"
"""


def tell(folder: Path, say: Callable[[str], None]) -> None:
    """The whole week in a folder that holds nothing yet; then its record and its page."""
    began = time.monotonic()
    deliveries = share_out()
    desk = Desk(folder, Clock(folder / CLOCK), say)
    with Receiver(desk.clock) as receiver:
        (folder / RECIPE).write_text(RECIPE_TEXT, encoding="utf-8")
        (folder / PIPELINE).write_text(PIPELINE_TEXT.format(url=receiver.url), encoding="utf-8")
        story = Story(desk, receiver)
        try:
            monday(story, deliveries["first"])
            tuesday(story)
            wednesday(story, deliveries["second"])
            thursday(story, deliveries["third"])
            friday(story, deliveries["fourth"])
            weekend(story, deliveries["third"], deliveries["fourth"])
            sunday(story)
        finally:
            took_s = time.monotonic() - began
            write_json(folder / RECORD, {"took_s": took_s, "days": [day.to_json() for day in story.days]})
    write_page(folder, story.ticks, folder / PAGE)
    say(f"\nSeven days in {took_s / 60:.1f} minutes. The page: {folder / PAGE}   the history's: {folder / 'history.html'}")


def empty_folder(folder: Path) -> None:
    """Makes the story's folder, in place of that of an earlier story. StoreError for a folder that no story has made."""
    if folder.exists():
        if not (folder / CLOCK / "sitecustomize.py").is_file():
            raise StoreError(f"{folder}: is there, and is no story's; name a folder that is not there yet")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("story"))
def main(folder: Path) -> None:
    """Tell a week of retraining in minutes, in FOLDER (default: story), which is made anew."""
    try:
        empty_folder(folder.absolute())
        tell(folder.absolute(), click.echo)
    except VggrowError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except Unexpected as error:
        click.echo(f"\nthe story ends here: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
