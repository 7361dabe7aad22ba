"""Numbers as files for people: a run's report, and where gates skip. Reads one dict; never touches a model."""

from .insight import numbers_beside as numbers_beside
from .insight import write_insight as write_insight
from .picture import draw as draw
from .render import StageRow as StageRow
from .render import summary_rows as summary_rows
from .render import verdict as verdict
from .render import write_report as write_report
