"""Tool calls: how they are asked of a model, and read from what it says."""

from server.tools.families import FORMATS
from server.tools.formats import Format
from server.tools.reader import ToolReader, whole
from server.tools.support import ToolPlan, Tools, reader_of

__all__ = ["FORMATS", "Format", "ToolPlan", "ToolReader", "Tools", "reader_of", "whole"]
