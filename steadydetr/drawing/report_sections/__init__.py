"""The values of the report's sections, a file each. Their order is in drawing/report.py, their looks are in report.html.jinja."""
