"""What can be said of a pair beside others, and what does it mean?"""

REASONS = {
    "DUP_EXACT": "Another pair has the same texts and stays instead.",
    "LABEL_CONFLICT": "Another pair prefers the answers the other way round; neither stays.",
}
"""Why a pair goes, by code."""
