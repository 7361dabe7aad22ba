"""A run's numbers as JSON, Markdown, HTML and a picture. Reads one dict; never touches a model."""

from .picture import draw as draw
from .render import StageRow as StageRow
from .render import summary_rows as summary_rows
from .render import verdict as verdict
from .render import write_report as write_report
