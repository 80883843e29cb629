"""The seam to torchtune: all code that depends on torchtune's private parts. If a fork changes one, start here.

``internals``        torchtune's private names, each behind a public one
``hf_checkpointer``  torchtune's checkpointer, for families that its release has no names for
``torchao_names``    lets torchtune's last release import with current torchao
``tune_plugin``      adds the humanline recipes and configs to the command ``tune``

``humanline.models.gemma2`` corrects torchtune's Gemma 2. This file imports nothing, because the last two modules must
run before torchtune is imported.
"""
