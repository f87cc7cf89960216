"""Pictures of the effect of pruning on an image: remaining tokens, scores, paths of the scans, hidden attention.

Each kind of picture has a NamedTuple of the arrays that are drawn, a function that makes it from a
`top_jax.evaluation.trace.Trace`, and a function that makes its `Section` of a page. Only this package and
`top_jax.ablation` import Matplotlib, and they use its Agg canvas alone: no window, no global state.

    photo.py           the images to draw (files, or examples of a source), their crops and the places of their patches
    examine.py         the forward passes that the pictures need: as configured, dense, and with other alignments
    kept_tokens.py     remaining tokens and their scores
    scan_paths.py      the order in which the scans visit the tokens
    attention_maps.py  hidden attention of the scans, or a DeiT's attention
    page.py            layout, colours, and drawing on a photo's cells
    sheet.py           everything about one image, as a PNG and a .npz
"""
