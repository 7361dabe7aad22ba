"""A run's numbers as JSON, Markdown, HTML and a picture; never touches a model."""

from .render import StageRow as StageRow
from .render import summary_rows as summary_rows
from .render import write_report as write_report
