"""Pictures of what pruning did to an image: which tokens stayed, by which scores, along which paths, seen by whom.

Each kind of picture is one file: a NamedTuple of the arrays that are drawn, the function that makes it of a
`top_jax.evaluation.trace.Trace`, and the function that makes its `Section` of a page. Matplotlib is needed here and
nowhere else, and through its Agg canvas alone: no window, no global state.

    pictures.py     the images: files, or examples of a source
    photo.py        the part of the photo that the model sees, and where its patches lie
    examine.py      the passes that the pictures need: as configured, dense, and with other alignments
    kept_tokens.py  score_maps.py  traversals.py  attention_maps.py
    sheet.py        all of it for one image: page.py is the PNG, record.py the .npz
"""
