"""The HTML report of a pruned model: one file that loads nothing else.

``data.collect`` makes of a result all that is shown, ``html.page`` makes of that the text.
"""
