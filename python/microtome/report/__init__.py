"""Figures and the self-contained HTML page, made from result tables alone."""

from microtome.report.features import feature_page, write_pages
from microtome.report.page import Card, Page

__all__ = ["Card", "Page", "feature_page", "write_pages"]
