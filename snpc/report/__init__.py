"""The HTML report of a pruned model, and the plot of a sweep: files that load nothing else.

data            everything that the page shows, as one value
page            that value as HTML
sweep_plot      quality against latency of a sweep, as SVG
charts          bars and curves, as shapes with coordinates
attention_maps  where the heads of a vision model look, before and after
token_maps      which patches of a picture are left where tokens get fewer
render          the templates (``templates/*.j2``) with their values
format          numbers and results in words
png             pictures as ``data:`` URLs
"""
