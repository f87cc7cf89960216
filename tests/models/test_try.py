import jax, jax.numpy as jnp, numpy as np, time
from flax import nnx
import top_jax.models as m
from top_jax.pruning import Pruning
def test_a(official):
    t=time.time()
    model=official.build()
    print('build',time.time()-t); t=time.time()
    y=jax.jit(lambda m,x:m(x))(model, official.image)
    print('fwd',time.time()-t); t=time.time()
    print(np.abs(y-official["logits"]).max())
    def loss(model,image): return jnp.sum(model(image)*official["grad_weight"][None])
    g,gi=jax.jit(jax.grad(loss,argnums=(0,1)))(model,official.image)
    print('grad',time.time()-t); t=time.time()
    print(type(g), np.abs(gi-official.grad_image).max()/np.abs(gi).max())
    model=official.build(remat=True)
    g=jax.grad(lambda x: loss(model,x))(jnp.asarray(official.image))
def test_pr():
    for al in ("none","hold","decay"):
        model=m.create_model("vim_tiny",img_size=32,depth=3,embed_dim=32,patch_size=8,d_state=4,pruning=Pruning(after_blocks=(1,),keep_ratio=.5,alignment=al),drop_path=.1)
        model(jnp.ones((2,32,32,3)))
        model.train()
        jax.jit(lambda m,x,k: m(x,k))(model,jnp.ones((2,32,32,3)),jax.random.split(jax.random.key(0),2))
    t=time.time()
    s=nnx.eval_shape(lambda: m.create_model("vim_base"))
    print(time.time()-t, sum(x.size for x in jax.tree.leaves(s)))
