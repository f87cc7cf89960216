"""Pictures of the effect of pruning on an image: remaining tokens, scores, paths of the scans, hidden attention.

The arrays of an image (`examine.ARRAYS`) are written to a .npz, and each section of its page is drawn from them. Only
this package and `top_jax.ablation` import Matplotlib, and they use its Agg canvas alone: no window, no global state.

    photo.py           the images to draw (files, or examples of a source), their crops and where their patches are
    examine.py         the forward passes that the pictures need, and their arrays
    page.py            layout, colours, and drawing on a photo's cells
    sheet.py           a PNG and a .npz of an image: remaining tokens, scores, paths of the scans, attention
    segmentation.py    the same for a segmenter
"""
