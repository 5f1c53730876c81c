"""Networks that many people train, and the image sizes to watch them at: for ``benchmarks/collect_layers.py``."""

from __future__ import annotations

SIDES = (224, 256, 288, 192, 320, 384, 512, 160, 448, 96, 64, 32, 128)

TORCHVISION = """
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 mnasnet0_5 mnasnet0_75
mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_3_2gf
regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_16gf regnet_y_1_6gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf
regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 vgg11 vgg11_bn
vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn wide_resnet101_2 wide_resnet50_2
""".split()

TIMM = """
bat_resnext26ts botnet26t_256 caformer_s18 cait_xxs24_224 coatnet_0_rw_224 coatnet_1_rw_224 coatnet_nano_rw_224
convformer_s18 convmixer_1024_20_ks9_p14 convmixer_768_32 convnext_atto convnext_femto convnext_nano convnext_pico
convnext_small convnext_tiny convnextv2_atto convnextv2_base convnextv2_femto convnextv2_nano convnextv2_pico
convnextv2_tiny crossvit_15_240 cs3darknet_l cs3darknet_m cspdarknet53 cspresnet50 cspresnext50 darknet53 davit_tiny
densenet121 densenet169 dla102 dla34 dla60 dla60_res2net dla60x dm_nfnet_f0 dpn107 dpn68 dpn92 eca_nfnet_l0
eca_nfnet_l1 ecaresnet26t ecaresnet50d ecaresnet50t ecaresnetlight edgenext_base edgenext_small edgenext_x_small
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_b1 efficientnet_b2
efficientnet_b3 efficientnet_b4 efficientnet_em efficientnet_es efficientnet_lite0 efficientnetv2_rw_s
efficientnetv2_rw_t efficientvit_b0 efficientvit_b1 ese_vovnet19b_dw ese_vovnet39b fastvit_sa12 fastvit_t8 fbnetc_100
focalnet_tiny_srf gc_efficientnetv2_rw_t gernet_l gernet_m gernet_s ghostnet_100 ghostnetv2_100 gmixer_24_224
halonet26t hardcorenas_a hardcorenas_f hgnet_small hgnetv2_b0 hgnetv2_b4 hrnet_w18 hrnet_w18_small_v2 hrnet_w32
hrnet_w48 inception_next_tiny inception_resnet_v2 inception_v4 lambda_resnet26t lcnet_100 legacy_senet154
legacy_seresnet50 legacy_xception levit_128 levit_256 mambaout_tiny maxvit_nano_rw_256 maxvit_tiny_rw_224 mixnet_l
mixnet_m mixnet_s mnasnet_100 mobilenetv2_100 mobilenetv2_140 mobilenetv3_large_100 mobilenetv3_small_100
mobilenetv4_conv_large mobilenetv4_conv_medium mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0
mobileone_s1 mobilevit_s mobilevit_xs mobilevitv2_050 mobilevitv2_100 nest_tiny nextvit_small nf_regnet_b1 nf_resnet50
nfnet_f0 nfnet_f1 nfnet_l0 poolformer_s12 poolformerv2_s12 pvt_v2_b0 pvt_v2_b1 pvt_v2_b2 rdnet_tiny regnetv_040
regnetx_002 regnetx_004 regnetx_006 regnetx_008 regnetx_016 regnetx_032 regnetx_040 regnetx_064 regnetx_080 regnetx_120
regnety_002 regnety_004 regnety_006 regnety_008 regnety_016 regnety_032 regnety_040 regnety_064 regnety_080 regnety_120
regnety_160 regnetz_b16 regnetz_c16 regnetz_d8 repghostnet_100 repvgg_a2 repvgg_b0 repvgg_b1 repvgg_b2 repvit_m1
res2net101_26w_4s res2net50_26w_4s res2next50 resmlp_12_224 resnest14d resnest26d resnest50d resnet101d resnet14t
resnet18 resnet26d resnet33ts resnet34 resnet50 resnet50d resnet51q resnetaa50 resnetblur50 resnetrs50 resnetv2_50
resnext50_32x4d rexnet_100 rexnet_150 selecsls42b semnasnet_100 sequencer2d_s seresnet50 seresnext101_32x8d
seresnext50_32x4d shvit_s1 skresnet50 spnasnet_100 starnet_s1 swin_tiny_patch4_window7_224 test_convnext
tf_efficientnetv2_b0 tf_efficientnetv2_b3 tf_efficientnetv2_m tf_efficientnetv2_s tinynet_a tresnet_m twins_svt_small
vgg16_bn vgg19 visformer_small vovnet39a wide_resnet50_2 xception xception41 xception65 xcit_tiny_12_p16_224
""".split()

TRANSFORMERS = """
beit bit convnext convnextv2 cvt data2vec-vision deit dinat dinov2 dpt efficientformer efficientnet focalnet glpn
hgnet_v2 hiera levit mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2 regnet resnet segformer swin
swinv2 swiftformer textnet van vit vitdet yolos
""".split()

SPEECH = """
data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm
""".split()
SAMPLES = (16_000, 80_000, 160_000, 240_000)
