"""The seam to torchtune: everything of ours that depends on its private parts. A fork that changes one reads here.

``internals``        its private names, each behind a public one
``hf_checkpointer``  its checkpointer, for families that it has no names for
``torchao_names``    lets its last release import with today's torchao
``tune_plugin``      makes its command ``tune`` know our recipes and configs

What its Gemma 2 computes wrong is mended in ``humanline.models.gemma2``. Nothing is imported here: the last two have to
act before torchtune is imported.
"""
